"""What command-line programs share: arguments, devices, models on disk, files, reports, several processes."""
