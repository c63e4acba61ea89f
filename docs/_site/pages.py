"""Make pages of what stands in the repository, for `mkdocs build`.

A page may include a Markdown file, as a README: `--8<-- "plugins/clip/README.md"`, or a section of it. Links are
written for readers of the repository, and lead to the page of the site that shows the same. A source file that is
linked becomes a page, and a picture is copied. A folder that is written as `how-to/*` in the navigation has the order
of its index page.
"""

import os
import re
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, InclusionLevel

INCLUDE = re.compile(r'^--8<-- "(\S+\.md)(?::(\w+))?"$', re.M)
CODE = r"^\s*(```+).*?^\s*\1$|(`+)(?!`).+?\2"  # in which links are none
LINK = re.compile(CODE + r"|(\]\(|^\[[^\]\n]+\]: +)([^)\s]+)", re.M | re.S)
ROW = re.compile(r"^(#+) (.+)$|^(?:\||[-*]) +\[(.+?)\]\((\S+?)\)", re.M)  # a heading, or a link that begins a row
LEXERS = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".sh": "bash", ".txt": "text"}
PICTURES = (".png", ".svg", ".jpg", ".gif")
MORE, LESS = {"boost": 2}, {"boost": 0.3}  # what a search shows first, and last
SEARCH = {
    "how-to": {"boost": 1.2}, "modules.md": MORE, "configuration.md": MORE, "commands.md": MORE,
    "changes.md": LESS, "contributing.md": LESS, "source": {"exclude": True},
}  # fmt: skip


def on_config(config):
    """Find which page shows which file, and fill in the folders of the navigation."""
    global site
    site = Site(Path(config.config_file_path).parent, Path(config.docs_dir))
    config.nav = site.filled(config.nav, set(site.named(config.nav)))
    return config


def on_files(files, config):
    """Add a page for each source file, and a copy of each picture, that a page links to."""
    for path in sorted(set(site.linked_sources())):
        if path.endswith(PICTURES):
            files.append(File.generated(config, f"source/{path}", abs_src_path=str(site.root / path)))
            continue
        text = (site.root / path).read_text(encoding="utf-8")
        shown = f"# {path}\n\n`````{LEXERS[Path(path).suffix]}\n{text}\n`````\n"
        uri = f"source/{path}.md"
        files.append(File.generated(config, uri, content=shown, inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown, page, config, files):
    """Include files, lead links to pages, and tell the search what counts."""
    uri = page.file.src_uri
    for place in (uri, uri.partition("/")[0]):
        if place in SEARCH:
            page.meta["search"] = SEARCH[place]
    return markdown if uri.startswith("source/") else site.text(uri, markdown)


class Site:
    """The pages below `docs`, and the files of the repository that they show."""

    def __init__(self, root, docs):
        self.root, self.docs = root, docs
        self.pages = {path.relative_to(docs).as_posix() for path in docs.rglob("*.md")}
        self.shown = {(docs / uri).relative_to(root).as_posix(): uri for uri in self.pages}
        for uri in sorted(self.pages):
            for name, section in INCLUDE.findall(self.raw(uri)):
                if not section:
                    self.shown[name] = uri

    def raw(self, uri):
        return (self.docs / uri).read_text(encoding="utf-8")

    def text(self, uri, markdown):
        """Return the text of a page with what it includes, and its links as the site has them."""
        parts, place = [], (self.docs / uri).relative_to(self.root).as_posix()
        for index, part in enumerate(INCLUDE.split(markdown)):
            if index % 3 == 0:
                parts.append(self.led(part, place, uri))
            elif index % 3 == 1:
                name = part
            else:
                parts.append(self.led(self.included(name, part), name, uri))
        return "".join(parts)

    def included(self, name, section):
        try:
            text = (self.root / name).read_text(encoding="utf-8")
        except OSError as error:
            raise PluginError(f"a page includes {name!r}, which cannot be read: {error}") from error
        if section:
            marks = [f"<!-- --8<-- [{word}:{section}] -->" for word in ("start", "end")]
            if not all(mark in text for mark in marks):
                raise PluginError(f"a page includes {name}:{section}; {name} has no {' or no '.join(marks)}")
            text = text.partition(marks[0])[2].partition(marks[1])[0]
        return text

    def led(self, text, place, uri):
        """Return a text of the file `place` with links that work on the page `uri`."""

        def link(match):
            before, target = match[3], match[4]
            if target is None:
                row = text[text.rfind("\n", 0, match.start()) + 1] == "|"
                return match[0].replace("\\|", "|") if row else match[0]  # as forges show code in tables
            if ":" in target or target.startswith("#"):
                return match[0]
            path, mark, anchor = target.partition("#")
            page = self.page_of(os.path.normpath(os.path.join(os.path.dirname(place), path)))
            return match[0] if page is None else before + os.path.relpath(page, os.path.dirname(uri)) + mark + anchor

        return LINK.sub(link, text)

    def page_of(self, path):
        """Return the page that shows a file of the repository, or None."""
        known = self.shown.get(path) or self.shown.get(f"{path}/README.md") or self.shown.get(f"{path}/index.md")
        outside = not (self.root / path).is_relative_to(self.docs) and (self.root / path).is_file()
        if known is None and outside and path.endswith(PICTURES):
            return f"source/{path}"
        if known is None and outside and path.endswith((*LEXERS,)):
            return f"source/{path}.md"
        return known

    def linked_sources(self):
        """Give the source files that pages link to."""
        for uri in self.pages:
            for match in LINK.finditer(self.text(uri, self.raw(uri))):
                path = os.path.normpath(os.path.join(os.path.dirname(uri), match[4] or "."))
                if path.startswith("source/"):
                    yield path.removeprefix("source/").removesuffix(".md")

    def named(self, nav):
        """Give the pages that the navigation names by themselves."""
        if isinstance(nav, str):
            yield nav
        for entry in nav if isinstance(nav, list) else nav.values() if isinstance(nav, dict) else ():
            yield from self.named(entry)

    def filled(self, nav, elsewhere):
        """Return the navigation with the pages of a folder in place of `folder/*`."""
        if isinstance(nav, dict):
            return {title: self.filled(entry, elsewhere) for title, entry in nav.items()}
        if isinstance(nav, list):
            filled = [self.filled(entry, elsewhere) for entry in nav]
            return [page for entry in filled for page in (entry if isinstance(entry, list) else [entry])]
        return self.listed(nav.removesuffix("/*"), elsewhere) if nav.endswith("/*") else nav

    def listed(self, folder, elsewhere):
        """Return the pages of a folder below the headings of its index page, in its order."""
        index = f"{folder}/index.md"
        groups, title, seen = {"": [index]}, "", {index, *elsewhere}
        for _, heading, name, target in ROW.findall(self.text(index, self.raw(index))):
            title = heading or title
            uri = os.path.normpath(os.path.join(folder, target))
            if target and uri in self.pages - seen:
                seen.add(uri)
                groups.setdefault(title, []).append({name.strip("`"): uri})
        first, *others = groups.items()
        if len(others) == 1:
            return first[1] + others[0][1]
        return first[1] + [{heading: pages} for heading, pages in others]
