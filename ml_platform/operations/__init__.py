"""What keeps a deployment healthy: alerts, dead runs, the web server, logs."""
