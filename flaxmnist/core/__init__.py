"""Pure functions of arrays: no devices, no disk, no printing, no jit."""
