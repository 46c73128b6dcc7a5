"""Files, locks, signals, devices and provenance; knows nothing of the other packages."""
