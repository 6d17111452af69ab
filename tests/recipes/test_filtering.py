"""The rules that drop pairs which are no translations: what each catches, and what looks like it but is right."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soli.recipes.nano_corpus.filtering import broken_rule, drop_suspects
from soli.recipes.nano_corpus.sources.row import SourceRow


@pytest.mark.parametrize(
    ("zh", "en", "rule"),
    [
        ("自定义内容不超过 16KB。", "Custom content, not exceeding 2 KB.", "numbers"),
        ("丹麦有5800万人口。", "Denmark has 5.8 million people.", "numbers"),
        ("请求状态：0 停用，1 启用", "Status of the request", "numbers"),
        ("幸存者", "Survivor: 7", "numbers"),
        ("默认值为 Earliest 位置", "The default position", "latin words"),
        ("我想 the whole of it 的意思大概就是这样的吧，不会是别的。", "That means the whole of it.", "untranslated"),
        ("转到 OpenOffice Writer", "Go to OpenOffice Writer", "untranslated"),
        ("又被称为ゼンタイ", "Also known as zentai", "language"),
        ("国家土地记录服务", "Usługa jest usługą zbiorczą prezentacji", "language"),
    ],
)
def test_the_rule_that_a_pair_breaks(zh, en, rule):
    assert broken_rule(zh, en) == rule


@pytest.mark.parametrize(
    ("zh", "en"),
    [
        ("4800公里外", "4,800 kilometres away"),
        ("长度为１０米", "A length of 10 metres"),
        ("约有16亿棵树", "About 1.6 billion trees"),
        ("有 7 个备用发电机。", "There are seven backup generators."),
        ("持续两回合", "Lasts 2 turns"),
        ("苏格兰在9月很温暖。", "Scotland is warm in September."),
        ("20世纪80年代", "The 1980s"),
        ("95%来自佛罗里达。", "Ninety-five percent come from Florida"),
        ("查看 ConfigMaps 列表", "View the list of Config Maps"),
        ("总大小（GB）", "Total gibibytes"),
        ("LibreOffice 的所有文档", "All documents of LibreOffice"),
        ("他在咖啡馆里。", "He is at the café."),
    ],
)
def test_pairs_that_no_rule_drops(zh, en):
    assert broken_rule(zh, en) is None


def test_a_dictionary_may_have_numbers_and_accents_but_no_foreign_words():
    assert broken_rule("孙燕姿", "Stefanie Sun (1978-), singer", dictionary=True) is None
    assert broken_rule("常住论", "eternalism (in Sanskrit śāśvata-vāda, śāśvata)", dictionary=True) is None
    assert broken_rule("TF卡", "microSD card", dictionary=True) == "latin words"


def test_lengths_are_compared_with_those_of_the_source():
    rows = [SourceRow("一只猫坐在垫子上" * n, "A cat sits on the mat. " * n) for n in range(1, 9) for _ in range(20)]
    long = SourceRow("一只猫坐在垫子上，然后看着窗外的小鸟，想了很久很久。", "A cat sits.")
    plausible, dropped = drop_suspects([*rows, long])
    assert plausible == rows and dropped == {"length": 1}
    assert drop_suspects([*rows, long], dictionary=True)[0] == [*rows, long]
    few, _ = drop_suspects([*rows[:40], long])
    assert long in few  # too few rows for a median


@given(st.integers(0, 10**6), st.sampled_from(["{:,}", "{}", "{}.0"]), st.sampled_from(["{}", "{}.0"]))
def test_equal_numbers_agree_however_they_are_written(number, english, chinese):
    assert broken_rule(f"共有{chinese.format(number)}个文件", f"It holds {english.format(number)} files") is None
    other = f"It holds {english.format(number + 1)} files"
    assert broken_rule(f"共有{chinese.format(number)}份文件", other) == "numbers"
