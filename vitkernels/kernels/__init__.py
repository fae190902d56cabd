"""How it is computed on the device: Triton kernels and their launch functions. The only place that imports Triton, but for
``_env``, which asks whether it can launch here.

A ``launch_<name>`` takes the arguments of the operator ``vitkernels::<name>`` (``ops/``), which has checked them.
"""

from .. import _env

_env.give_triton_a_cache()
