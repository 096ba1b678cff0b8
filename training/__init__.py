"""What stands above model.py: the run's folder, checkpoints, devices, processes, metrics, the leak check."""
