"""`hookline runs serve`: a page on the runs of a folder that goes on with them, on this machine alone unless asked.

It reads the records that the plugin `jsonl` keeps, with the pictures and tables that they name, and nothing else. What
stands in them is text of strangers: it leaves as JSON, and the page sets it as text. What people write on runs it keeps
beside the record, for those who have the address that the command printed. Imports nothing heavy.
"""

from __future__ import annotations

import sys
from pathlib import Path

from hookline_runs.report.server import Server
from hookline_runs.report.shelf import check_folder


def serve(folder: Path, host: str, port: int) -> None:
    """Serve a folder of runs until the process is ended; print where.

    Raises:
        ValueError: there is no such folder, or the address cannot be had.
        KeyboardInterrupt: by Ctrl-C.
    """
    check_folder(folder)
    try:
        server = Server(folder.resolve(), host, port)
    except (OSError, OverflowError, UnicodeError) as error:
        raise ValueError(f"--host {host} --port {port} cannot be served: {error}") from error
    with server:
        if not server.local:
            print(
                f"hookline: whoever reaches {host} can read all runs of {folder}, without a password; "
                "nobody can change them there",
                file=sys.stderr,
            )
        key = f"#key={server.key}" if server.key else ""
        print(f"{server.url}{key} shows the runs of {folder}; Ctrl-C ends it", flush=True)
        server.serve_forever()
