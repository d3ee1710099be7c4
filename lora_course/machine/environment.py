"""What must be installed beside the course, and how it is mended without touching anything else."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import Iterable

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import lora_course
from lora_course.machine.installer import cell_line
from lora_course.machine.installer import install as install_packages

COURSE = "lora-course"
# PEFT raises ImportError at the first plain linear where it finds an older one of these; Colab and Kaggle preinstall
# torchao 0.10. Where they are not installed, nobody needs them. A newer torchao than asked for may need a newer torch:
# 0.18 imports names that torch has since 2.10.
REFUSED_WHEN_OLDER = (Requirement("torchao>=0.16.0"), Requirement("gptqmodel>=7.0.0"))
KEPT = ("torch", "numpy")  # an image's own builds: nothing may replace them
RESTART = (
    "restart the session (Colab: Runtime > Restart session; Kaggle: Run > Restart) and run it again"
)
replaced_while_loaded: list[str] = []  # by `prepare`; a restart, which mends that, forgets it


def installed() -> dict[str, str]:
    """Distribution → version of all that Python finds, in the form `canonicalize_name` gives; the first on the path counts."""
    versions: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name:
            versions.setdefault(canonicalize_name(name), distribution.version)
    return versions


def wanting(versions: dict[str, str] | None = None) -> list[Requirement]:
    """Requirements of the course that are not met here, and those of PEFT on what happens to be here. Empty: all is well.

    versions: `installed()` by default.
    """
    versions = installed() if versions is None else versions
    needed = _requirements(COURSE)
    optional = [need for need in REFUSED_WHEN_OLDER if canonicalize_name(need.name) in versions]
    return [need for need in [*needed, *optional] if not _met(need, versions)]


def _requirements(name: str) -> list[Requirement]:
    """What an installed distribution requires here, without its extras."""
    needs = [Requirement(text) for text in importlib.metadata.requires(name) or []]
    return [need for need in needs if not need.marker or need.marker.evaluate({"extra": ""})]


def _met(need: Requirement, versions: dict[str, str]) -> bool:
    version = versions.get(canonicalize_name(need.name))
    return version is not None and need.specifier.contains(version, prereleases=True)


def install(needs: Iterable[Requirement]) -> None:
    """Installs what is asked for, then what that lacks, and nothing else: pip resolves nothing, so it replaces nothing.

    A package that is there already stays in the versions that its other users ask for (`bounded`).
    Raises RuntimeError with one sentence where that can't be: no network, no such version, or another torch would be needed.
    """
    needs = list(needs)
    while needs:
        kept = [need for need in needs if canonicalize_name(need.name) in KEPT]
        if kept:
            raise RuntimeError(
                f"the course would need {listed(kept)}, and {kept[0].name} {installed()[kept[0].name]} is here: take a newer "
                "runtime, or set LORA_COURSE_SOURCE to an older release of the course"
            )
        install_packages([bounded(need) for need in needs], alone=True)
        needs = _lacking({canonicalize_name(need.name) for need in needs})


def _lacking(names: set[str]) -> list[Requirement]:
    """What installed distributions require and don't find; one requirement for each package."""
    versions = installed()
    found: dict[str, Requirement] = {}
    for name in sorted(names):
        for need in _requirements(name):
            if not _met(need, versions):
                key = canonicalize_name(need.name)
                together = found[key].specifier & need.specifier if key in found else need.specifier
                found[key] = Requirement(f"{need.name}{together}")
    return list(found.values())


def bounded(need: Requirement) -> str:
    """A requirement as pip reads it, kept below the next major version of what is there, unless it asks for more: 1.40 and
    not 2.4 where 1.11 is. Of a 0.x each minor version may break what the one before did, so there it is the first that is
    asked for: 0.16 and not 0.18 where 0.10 is."""
    version = installed().get(canonicalize_name(need.name))
    if version is None:
        return str(need)
    major = Version(version).major
    lowest = max(
        (
            Version(part.version.removesuffix(".*"))
            for part in need.specifier
            if part.operator in (">=", "==", "~=", ">")
        ),
        default=Version(version),
    )
    if lowest.major > major:
        return str(need)
    below = f"0.{lowest.minor + 1}" if major == 0 else major + 1
    return str(Requirement(f"{need.name}{need.specifier},<{below}"))


def prepare(version: str, hosted: bool) -> None:
    """The second half of a chapter's set-up cell: mends what is missing or refused, and says in one line what it did.

    version: the course's, that the chapter was written with. hosted: on Colab or Kaggle, where packages are installed
    without asking; elsewhere the line to paste is printed instead.
    Raises SystemExit with one sentence where the chapter can't go on.
    """
    before = installed()
    if before[COURSE] != lora_course.__version__:  # the cell brought the chapter's own, say
        sys.exit(
            f"lora-course {lora_course.__version__} is loaded in this session, and {before[COURSE]} is installed: {RESTART}."
        )
    if before[COURSE] != version:
        print(f"This chapter was written with lora-course {version}; {before[COURSE]} is here.")
    needs = wanting(before)
    if needs and not hosted:
        sys.exit(f"The course needs {listed(needs)}. Paste: {cell_line(map(bounded, needs))}")
    if needs:
        try:
            install(needs)
        except RuntimeError as error:
            sys.exit(str(error))
        forget_what_was_looked_up()
    after = installed()
    changed = [name for name, version in after.items() if before.get(name) != version]
    news = [
        f"{name} {after[name]} ({f'was {before[name]}' if name in before else 'new'})"
        for name in changed
    ]
    kept = [name for name in ("torch", "numpy", "transformers") if name not in changed]
    print(
        f"lora-course {before[COURSE]}: installed {', '.join(news)}; as they were: {', '.join(f'{name} {after[name]}' for name in kept)}."
        if news
        else f"lora-course {before[COURSE]} is ready."
    )
    replaced_while_loaded.extend(name for name in changed if name.replace("-", "_") in sys.modules)
    if replaced_while_loaded:
        sys.exit(f"An older {replaced_while_loaded[0]} is loaded in this session: {RESTART}.")


def forget_what_was_looked_up() -> None:
    """transformers keeps what it found installed when it first looked; after an installation it must look again."""
    importlib.invalidate_caches()
    for name in ("transformers.utils.import_utils", "peft.import_utils"):
        for looked_up in vars(sys.modules.get(name, object)).values():
            if hasattr(looked_up, "cache_clear"):
                looked_up.cache_clear()


def listed(needs: Iterable[Requirement]) -> str:
    return ", ".join(str(need) for need in needs)
