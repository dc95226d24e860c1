"""Storage of the platform's data: files and objects, partitions, reports, quality limits, migrations."""
