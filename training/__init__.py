"""What stands above model.py: the run's folder, checkpoints, the optimiser, devices, processes,
metrics, the leak check."""
