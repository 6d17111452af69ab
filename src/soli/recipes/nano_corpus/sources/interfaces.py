"""The sources that are texts of programs: their packages, readers and licences. Versions are pinned where a later one
has another licence (scratch-l10n, matrix-react-sdk: AGPL) or another layout."""

from __future__ import annotations

from soli.recipes.nano_corpus.fetch import Package
from soli.recipes.nano_corpus.sources import android, browsers, gettext, locale_files, program_texts
from soli.recipes.nano_corpus.sources.source import Reader, Source

_APACHE, _BSD, _MIT, _MOZILLA = "Apache-2.0", "BSD-3-Clause", "MIT", "MPL-2.0"


def _source(name: str, licence: str, read: Reader, client: str, *packages: str) -> Source:
    return Source(name, "pairs", tuple(Package(client, (package,)) for package in packages), read, licence)


INTERFACES: tuple[Source, ...] = (
    _source("hsk-sentences", "CC-BY-SA-4.0", program_texts.read_hsk, "pip", "hsk-sentences-audio==1.0.0"),
    _source("chromium", _BSD, browsers.read_chromium, "apt", "chromium-common", "chromium-l10n"),
    _source(
        *("firefox-esr", _MOZILLA, browsers.read_mozilla, "apt"),
        *("firefox-esr", "firefox-esr-l10n-zh-cn", "firefox-esr-l10n-zh-tw"),
    ),
    _source(
        *("thunderbird", _MOZILLA, browsers.read_mozilla, "apt"),
        *("thunderbird", "thunderbird-l10n-zh-cn", "thunderbird-l10n-zh-tw"),
    ),
    _source("scratch-l10n", _BSD, locale_files.SCRATCH.read, "npm", "scratch-l10n@4.0.31"),
    _source("renpy-demo", _MIT, program_texts.read_renpy, "apt", "renpy-demo"),
    _source("android", _APACHE, android.read_android, "apt", "android-framework-res"),
    _source("homeassistant-2026", _APACHE, locale_files.HOME_ASSISTANT.read, "pip", "homeassistant==2026.2.3"),
    _source(
        *("ha-frontend", _APACHE, locale_files.HOME_ASSISTANT_FRONTEND.read, "pip"),
        "home-assistant-frontend==20260128.6",
    ),
    _source("osm-id", "ISC", locale_files.OPENSTREETMAP.read, "npm", "@openstreetmap/id@2.42.2"),
    _source("osrm-text", "BSD-2-Clause", locale_files.OSRM.read, "npm", "osrm-text-instructions@0.15.0"),
    _source("matrix-react-sdk", _APACHE, locale_files.MATRIX.read, "npm", "matrix-react-sdk@3.80.0"),
    _source("kolibri", _MIT, locale_files.KOLIBRI.read, "pip", "kolibri==0.19.5"),
    _source("jupyterlab", _BSD, gettext.read_catalogues, "pip", "jupyterlab-language-pack-zh-CN==4.5.post3"),
    _source("indico", _MIT, gettext.read_catalogues, "pip", "indico==3.0rc1"),
    _source("spyder", _MIT, gettext.read_catalogues, "pip", "spyder==6.1.8"),
    _source("horizon", _APACHE, gettext.read_catalogues, "pip", "horizon==27.0.0"),
    _source("superset", _APACHE, gettext.read_catalogues, "pip", "apache-superset==6.1.0"),
    _source("pgadmin4", "PostgreSQL", gettext.read_catalogues, "pip", "pgadmin4==9.18"),
    _source("wagtail", _BSD, gettext.read_catalogues, "pip", "wagtail==8.0.1"),
    _source("thonny", _MIT, gettext.read_catalogues, "pip", "thonny==5.0.1"),
    _source("airflow", _APACHE, locale_files.AIRFLOW.read, "pip", "apache-airflow-core==3.3.2"),
    _source("debmake-doc", _MIT, program_texts.read_debmake, "apt", "debmake-doc"),
    _source(
        *("vscode", _MIT, program_texts.read_vscode, "npm"),
        *("@codingame/monaco-vscode-language-pack-zh-hans@25.1.2", "@codingame/monaco-vscode-api@25.1.2"),
    ),
    _source("rancher-shell", _APACHE, locale_files.RANCHER.read, "npm", "@rancher/shell@3.0.8"),
    _source(
        *("node-red", _APACHE, locale_files.NODE_RED.read, "npm"),
        *("@node-red/nodes@5.0.7", "@node-red/editor-client@5.0.7"),
    ),
    _source("blockly", _APACHE, program_texts.read_blockly, "npm", "blockly@12.5.1"),
    _source("univer-formula", _APACHE, program_texts.read_sheet_formulas, "npm", "@univerjs/sheets-formula@0.25.2"),
    _source("typescript", _APACHE, program_texts.read_typescript, "npm", "typescript@5.9.3"),
    _source(
        "cldr-annotations", "Unicode-3.0", locale_files.read_spoken_names, "npm", "cldr-annotations-full@48.2.0"
    ),
    _source(
        *("tencentcloud-sdk", _APACHE, program_texts.read_tencent, "pip"),
        *("tencentcloud-sdk-python==3.1.195", "tencentcloud-sdk-python-intl-en==3.1.193"),
    ),
)
