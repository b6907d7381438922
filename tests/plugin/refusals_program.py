"""Prints, as JSON, how SGLang's launcher answers each of the command lines on standard input.

Run by test_refusals.py, in one process for all of them; it goes the launcher's way up to the point where the first
process would be started and the first weight loaded.
"""

import json
import os
import sys
import warnings


def answer(arguments: list[str], environment: dict[str, str]) -> str:
    from sglang.srt.server_args import prepare_server_args

    os.environ.update(environment)
    try:
        server_args = prepare_server_args(arguments)
        if hasattr(server_args, "resolve_once"):
            server_args.resolve_once()  # 0.5.23 resolves settings only now
        server_args.check_server_args()
    except SystemExit as refusal:
        return str(refusal)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        for name in environment:
            del os.environ[name]
    return "starts"


def main() -> None:
    warnings.simplefilter("ignore")
    from sglang.srt.plugins import load_plugins

    load_plugins()
    for arguments, environment in json.load(sys.stdin):
        print(json.dumps(answer(arguments, environment)), flush=True)


if __name__ == "__main__":
    main()
