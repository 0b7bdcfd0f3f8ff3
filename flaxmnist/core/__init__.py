"""Pure functions of arrays: no disk, no printing, no choice of devices. They are compiled elsewhere."""
