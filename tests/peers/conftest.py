"""Settings of the libraries that have to be there before their import.

The libraries themselves are imported without a way out: where one is missing, these tests fail.
"""

import importlib.util
import os
import sys
import types

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its kernels need a GPU; its PyTorch code computes the same

# dictionary-learning imports nnsight to read models; its SAEs do not need it, and the library is installed without its
# requirements, which ask for other versions than those of SAELens.
if importlib.util.find_spec("nnsight") is None:
    stand_in = types.ModuleType("nnsight")
    stand_in.LanguageModel = object
    sys.modules["nnsight"] = stand_in
