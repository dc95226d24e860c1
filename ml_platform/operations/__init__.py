"""Operations of a deployment: alerts, dead runs, web server, logs."""
