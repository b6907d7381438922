"""HATA for SGLang: decode attends to the few cached tokens that matter, chosen by Hamming distance of hash codes.

Installing the distribution is all that SGLang needs: it finds `register` through the entry point. This module imports
neither torch nor SGLang.
"""

from __future__ import annotations

import traceback
from typing import Any

__version__ = "0.1.0"


def register() -> None:
    """SGLang's entry point, called once in each of its processes. Never breaks a server that does not ask for HATA."""
    from sglang_hata import compat

    try:
        compat.register()
    except Exception as error:
        # SGLang would log a plugin's failure and go on, and argparse would then reject --hata without a reason.
        traceback.print_exc()
        compat.refuse_flags(str(error))


def server_args(**kwargs: Any) -> Any:
    """SGLang's ServerArgs from keywords that may include ``hata=True``; see `compat.server_args`."""
    from sglang_hata import compat

    return compat.server_args(**kwargs)
