"""What everything stands on: errors, files, how options are declared and read, the loss.

Imports nothing from above.
"""
