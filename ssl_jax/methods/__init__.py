"""One file per method; its name is the module's name. `base` holds the interface."""
