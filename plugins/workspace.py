"""The build backend of `pip install -e ./plugins`: the plugins of this folder, editable, by a single build.

The wheel has a line of a `.pth` file for the sources of each plugin, and in a folder of its own the metadata of each,
as its own backend writes it. So Python finds every plugin as a distribution of its own, with its entry points. Those
that `requirements-dev.txt` names one by one, because they bring large libraries, are left out.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import tempfile
import zipfile
from collections.abc import Mapping
from email.parser import Parser
from pathlib import Path
from typing import Any, NoReturn

from flit_core import buildapi

HERE = Path(__file__).parent
NAME, VERSION = "hookline_plugins", "0.1.0"
INFO = f"{NAME}-{VERSION}.dist-info"
TAGS = "Wheel-Version: 1.0\nGenerator: workspace\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def build_editable(wheels: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    """Write the wheel into a folder, and return its name (PEP 660)."""
    plugins = chosen()
    described: dict[str, str] = {}
    needs: set[str] = set()
    for plugin in plugins:
        files = describe(plugin)
        described |= {f"{NAME}/{name}": text for name, text in files.items()}
        (text,) = (text for name, text in files.items() if name.endswith("/METADATA"))
        needs |= set(Parser().parsestr(text).get_all("Requires-Dist", []))
    others = [need for need in sorted(needs) if not need.startswith("hookline") and "extra ==" not in need]
    about = [
        "Metadata-Version: 2.1",
        f"Name: {NAME}",
        f"Version: {VERSION}",
        *(f"Requires-Dist: {one}" for one in others),
    ]
    return write(
        Path(wheels),
        {
            f"{NAME}.pth": "\n".join([NAME, *(str(plugin / "src") for plugin in plugins)]),
            **described,
            f"{INFO}/METADATA": "\n".join(about),
            f"{INFO}/WHEEL": TAGS,
        },
    )


def build_wheel(wheels: str, config_settings: Any = None, metadata_directory: str | None = None) -> NoReturn:
    """Refuse a copy of all plugins, which is not what anybody wants.

    Raises:
        SystemExit: what to do.
    """
    raise SystemExit("install all plugins by `pip install -e ./plugins`, or one by `pip install ./plugins/NAME`")


def chosen() -> list[Path]:
    """Return the folders of plugins, without those that `requirements-dev.txt` names."""
    apart = (HERE.parent / "requirements-dev.txt").read_text().splitlines()
    folders = sorted(file.parent for file in HERE.glob("*/pyproject.toml"))
    return [folder for folder in folders if f"-e ./plugins/{folder.name}" not in apart]


def describe(plugin: Path) -> dict[str, str]:
    """Return the files of a plugin's `.dist-info`, by name, with what pip would say of where it is."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(plugin):
        info = Path(folder, buildapi.prepare_metadata_for_build_editable(folder))
        files = {str(file.relative_to(folder)): file.read_text() for file in info.rglob("*") if file.is_file()}
    origin = {"url": plugin.as_uri(), "dir_info": {"editable": True}}
    return {**files, f"{info.name}/direct_url.json": json.dumps(origin)}


def write(folder: Path, files: Mapping[str, str]) -> str:
    """Write a wheel of these files, and return its name."""
    wheel, record = f"{NAME}-{VERSION}-py3-none-any.whl", f"{INFO}/RECORD"
    rows = [f"{name},sha256={digest(text)},{len(text.encode())}\n" for name, text in files.items()]
    with zipfile.ZipFile(folder / wheel, "w") as archive:
        for name, text in {**files, record: "".join([*rows, f"{record},,\n"])}.items():
            archive.writestr(name, text)
    return wheel


def digest(text: str) -> str:
    """Return the hash of a text, as RECORD has it."""
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
