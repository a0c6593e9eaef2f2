"""From kernels to one call a step: the translation unit, the host module and the launch plan."""
