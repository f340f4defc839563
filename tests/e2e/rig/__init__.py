"""The rig of the end-to-end tests: daemons, monitor, guest, images, faults, and the runner."""
