"""The scenarios, one module per job or verb; see rig.scenario."""
