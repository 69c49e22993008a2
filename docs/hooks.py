"""Hooks of the documentation site (mkdocs.yml).

The pages lie where a reader of the repository looks for them: README.md and CONTRIBUTING.md at the top, benchmarks/
beside docs/. The site keeps these paths, so one relative link works in both. Formulas and diagrams are drawn by KaTeX
and Mermaid. Both are served by the site itself; they come from the npm registry at the first build.
"""

import base64
import hashlib
import re
import tarfile
import urllib.request
from io import BytesIO
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
VENDOR = ROOT / "docs" / "vendor"
PAGES = ["*.md", "docs/**/*.*", "benchmarks/*.md", "benchmarks/results/*.*", "configs/*.py", "LICENSE"]

REGISTRY = "https://registry.npmjs.org/{name}/-/{name}-{version}.tgz"
PACKAGES = {
    "mermaid": (
        "11.17.2",
        "V6K3C8EBdEsPFZXSKMJe6ppQOENxuHARr9GvHX4hh47lAbhMRD9qf4oEK7LoaRQxULMa80/qt5gHO73aCleBBg==",
        r"dist/mermaid\.min\.js",
    ),
    "katex": (
        "0.19.1",
        "jG8uKntjSEcm2EpQOh0XturpPuuC9r3Sq5HLHdsFdWZT27E672SF19QEi+of0/YeOy15lDgRhKvr5614uRrEfA==",
        r"dist/(katex\.min\.(js|css)|fonts/.*\.woff2)",
    ),
}


def on_startup(command, dirty):
    for name in PACKAGES:
        if not (VENDOR / name).is_dir():
            vendor(name)


def vendor(name: str) -> None:
    """Downloads what the site needs of an npm package into docs/vendor, and checks its SHA-512."""
    version, sha512, wanted = PACKAGES[name]
    url = REGISTRY.format(name=name, version=version)
    with urllib.request.urlopen(url, timeout=60) as response:
        archive = response.read()
    if base64.b64encode(hashlib.sha512(archive).digest()).decode() != sha512:
        raise SystemExit(f"{url}: the SHA-512 differs from the one in docs/hooks.py")
    with tarfile.open(fileobj=BytesIO(archive)) as tar:
        for member in tar.getmembers():
            path = member.name.removeprefix("package/")
            file = tar.extractfile(member) if re.fullmatch(wanted, path) else None
            if file:
                out = VENDOR / name / path.removeprefix("dist/")
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_bytes(file.read())


def on_files(files, config):
    """The repository's own paths in place of those below docs/; the theme's files stay."""
    paths = {path for pattern in PAGES for path in ROOT.glob(pattern) if path.is_file()}
    names = sorted(path.relative_to(ROOT).as_posix() for path in paths)
    theme = [file for file in files if file.src_dir != config.docs_dir]
    return Files([*theme, *(File(name, str(ROOT), config.site_dir, config.use_directory_urls) for name in names)])


def on_post_page(output, page, config):
    """Only pages with a diagram or a formula load Mermaid or KaTeX."""
    for name, sign in (("mermaid", 'class="mermaid"'), ("katex", 'class="arithmatex"')):
        if sign not in output:
            output = re.sub(rf"<(script|link)\b[^>]*vendor/{name}/[^>]*>(</script>)?\n?", "", output)
    return output
