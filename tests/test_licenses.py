"""The verdict over parents' licences, rule by rule (docs/lineage.md)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merger.errors import LicenseRefused, exit_code
from merger.licenses import KINDS, Verdict, kind_of, require_license, verdict
from merger.lineage import Card, Parent


def parent(license: str | None, name: str = "", **fields: str) -> Parent:
    repository = f"org/{name or license}"
    return Parent(repository, repository, "c" * 40, card=Card(license=license, **fields))


def judge(*licenses: str | None, name: str | None = None) -> Verdict:
    return verdict([parent(license) for license in licenses], name)


@pytest.mark.parametrize(
    ("licenses", "carried"),
    [
        (["mit"], "mit"),
        (["mit", "mit"], "mit"),
        (["apache-2.0", "mit", "bsd-3-clause"], "apache-2.0"),
        (["cc-by-4.0", "apache-2.0", "cc0-1.0"], "cc-by-4.0"),
        (["mit", "gpl-3.0"], "gpl-3.0"),
        (["apache-2.0", "gpl-3.0", "agpl-3.0"], None),  # gpl passes into agpl, apache into both
        (["cc-by-sa-3.0", "cc-by-sa-4.0"], "cc-by-sa-4.0"),
        (["cc-by-nc-4.0", "apache-2.0"], "cc-by-nc-4.0"),
        (["cc-by-nc-4.0", "cc-by-nc-sa-4.0", "mit"], "cc-by-nc-sa-4.0"),
        (["cc-by-nc-2.0", "cc-by-nc-4.0"], "cc-by-nc-4.0"),
        (["apple-amlr", "mit"], "apple-amlr"),
        (["llama3.1", "mit"], "llama3.1"),
        (["gemma", "apache-2.0"], "gemma"),
        (["creativeml-openrail-m", "creativeml-openrail-m"], "creativeml-openrail-m"),
        (["mpl-2.0", "lgpl-3.0"], "lgpl-3.0"),
    ],
)
def test_the_most_demanding_licence_is_carried(licenses, carried):
    for order in (licenses, licenses[::-1]):
        found = judge(*order)
        assert (found.kind, found.license) == ("carried", {"license": carried or "agpl-3.0"})
        for license in licenses:
            assert any(f"org/{license}" in reason for reason in found.reasons)


@pytest.mark.parametrize(
    "licenses",
    [
        ["cc-by-nd-4.0"],
        ["mit", "cc-by-nc-nd-4.0"],
        ["my-nd-1.0", "mit"],
        ["gpl-3.0", "llama3.1"],
        ["agpl-3.0", "gemma"],
        ["cc-by-sa-4.0", "openrail"],
        ["gpl-3.0", "cc-by-nc-4.0"],
        ["cc-by-sa-4.0", "cc-by-nc-sa-4.0"],
        ["cc-by-nc-4.0", "apple-amlr"],
        ["cc-by-nc-sa-4.0", "llama3.1"],
    ],
)
def test_what_nobody_may_pass_on_is_refused(licenses):
    for order in (licenses, licenses[::-1]):
        found = judge(*order)
        assert (found.kind, found.license) == ("refuse", {})
        assert f"org/{licenses[0]}" in found.reasons[0] or f"org/{licenses[-1]}" in found.reasons[0]
        with pytest.raises(LicenseRefused) as raised:
            require_license(found, accepted=True)
        assert raised.value.remedy == ""


@pytest.mark.parametrize(
    ("licenses", "fields"),
    [
        ([None], {}),
        (["unknown"], {}),
        (["cc"], {}),
        ([None, "mit"], {}),  # no more freedom than is known
        ([None, "llama3.1"], {"license": "llama3.1"}),
        (["new-license-1.0"], {"license": "new-license-1.0"}),
        (["other"], {"license": "other"}),
        (
            ["llama3.1", "gemma", "mit"],
            {"license": "other", "license_name": "llama3.1-and-gemma", "license_link": "LICENSE"},
        ),
        (
            ["cc-by-nc-4.0", "llama3.1"],
            {"license": "other", "license_name": "cc-by-nc-4.0-and-llama3.1", "license_link": "LICENSE"},
        ),
        (
            ["gpl-2.0", "apache-2.0"],
            {"license": "other", "license_name": "gpl-2.0-and-apache-2.0", "license_link": "LICENSE"},
        ),
        (
            ["gpl-2.0", "gpl-3.0"],
            {"license": "other", "license_name": "gpl-2.0-and-gpl-3.0", "license_link": "LICENSE"},
        ),
    ],
)
def test_what_is_not_sure_is_asked(licenses, fields):
    found = judge(*licenses)
    assert (found.kind, dict(found.license)) == ("ask", fields)
    assert found.reasons
    with pytest.raises(LicenseRefused, match=r"--accept-license.*output\.accept_license: true") as raised:
        require_license(found, accepted=False)
    assert exit_code(raised.value) == 2
    require_license(found, accepted=True)


def test_what_is_carried_needs_no_word():
    require_license(judge("mit"), accepted=False)
    assert verdict([]) == Verdict("carried", {})


def test_a_licence_of_its_own_keeps_its_name_and_leads_to_its_text():
    own = parent("other", "a", license_name="My Research License", license_link="LICENSE.md")
    found = verdict([own, parent("mit")])
    assert found.license == {
        "license": "other",
        "license_name": "my-research-license",
        "license_link": f"https://huggingface.co/org/a/blob/{'c' * 40}/LICENSE.md",
    }
    assert found.kind == "ask"
    folder = Parent("a", card=Card("other", "x", "LICENSE"))
    assert verdict([folder]).license == {"license": "other", "license_name": "x", "license_link": "LICENSE"}
    away = parent("other", "a", license_name="x", license_link="https://a.b/c")
    assert verdict([away]).license["license_link"] == "https://a.b/c"


def test_names_of_licences_of_their_own_tell_what_they_forbid():
    assert verdict([parent("other", "a", license_name="CC-BY-NC-ND-4.0")]).kind == "refuse"
    assert verdict([parent("other", "a", license_name="cc-by-4.0")]).license == {"license": "cc-by-4.0"}
    dev = parent("other", "a", license_name="flux-1-dev-non-commercial-license")
    assert any("commercial" in text for text in verdict([dev]).obligations)
    assert verdict([dev, parent("gpl-3.0")]).kind == "refuse"


@pytest.mark.parametrize(
    ("license", "name", "kind"),
    [
        ("llama3.1", None, "carried"),
        ("llama3.1", "me/Llama-soup", "carried"),
        ("llama3.1", "Llama-soup", "carried"),
        ("llama3.1", "me/soup-of-Llama", "ask"),
        ("llama3.1", "Llama/soup", "ask"),
        ("llama3", "me/Llama-3-soup", "carried"),
        ("llama3", "me/Llama3_soup", "carried"),
        ("llama3", "me/Llama-soup", "ask"),
        ("llama4", "me/soup", "ask"),
        ("llama2", "me/soup", "carried"),
        ("gemma", "me/soup", "carried"),
    ],
)
def test_names_of_what_is_made_of_llama_begin_with_it(license, name, kind):
    found = judge(license, "mit", name=name)
    assert (found.kind, found.license) == (kind, {"license": license})
    assert kind == "carried" or "begin with Llama" in found.reasons[0]


def test_what_licences_ask_for_is_told():
    llama = judge("llama3.2")
    assert "Built with Llama." in llama.obligations
    assert llama.notices[0].startswith("Llama 3.2 is licensed under the Llama 3.2 Community License")
    assert "Built with Meta Llama 3." in judge("llama3").obligations
    assert "ai.google.dev/gemma/terms" in judge("gemma").notices[0]
    assert any("use" in text for text in judge("bigcode-openrail-m").obligations)
    assert "Not for commercial use (cc-by-nc-4.0)." in judge("cc-by-nc-4.0", "mit").obligations
    assert "Name the makers of org/cc-by-4.0 (cc-by-4.0)." in judge("cc-by-4.0", "gpl-3.0").obligations
    assert any("gpl-3.0" in text for text in judge("gpl-3.0").obligations)
    assert judge("mit", "apache-2.0").obligations == ()


def test_gated_parents_are_asked_about_in_public_only():
    gated = Parent("org/a", "org/a", gated=True, card=Card("mit"))
    found = verdict([gated])
    assert (found.kind, found.license) == ("ask", {"license": "mit"})
    assert "org/a is gated" in found.reasons[0]
    assert verdict([gated], public=False).kind == "carried"


def test_many_parents_make_one_sentence():
    folders = [Parent(f"run/step-{i}") for i in range(50)]
    assert verdict(folders).reasons == ("run/step-0, run/step-1 and 48 more declare no licence",)
    assert verdict(folders[:1]).reasons == ("run/step-0 declares no licence",)
    assert verdict(folders[:3]).reasons == ("run/step-0, run/step-1 and run/step-2 declare no licence",)


def test_the_kinds_follow_the_ids():
    for name, kind in KINDS.items():
        words = name.split("-")
        assert ("nd" in words) == (kind == "no-derivatives")
        assert "nc" not in words or kind in ("non-commercial", "no-derivatives")
        assert kind_of(name) == kind
    assert kind_of("cc-by-nc-5.0") == "non-commercial"
    assert kind_of("brand-new") == "unknown"


LICENSES = st.sampled_from([None, "unknown", "other", "new-1.0", *KINDS])


@given(st.lists(LICENSES, min_size=1, max_size=5), st.randoms())
def test_the_order_of_parents_does_not_matter(licenses, random):
    found = judge(*licenses)
    shuffled = random.sample(licenses, len(licenses))
    other = judge(*shuffled)
    assert (found.kind, sorted(found.obligations)) == (other.kind, sorted(other.obligations))
    if found.license.get("license") != "other":
        assert found.license == other.license


@given(st.lists(LICENSES, min_size=1, max_size=4), LICENSES)
def test_no_further_parent_undoes_a_refusal(licenses, more):
    """A question it may settle: what is under MPL-2.0 and under LGPL-2.1 goes together under GPL-3.0."""
    assert judge(*licenses).kind != "refuse" or judge(*licenses, more).kind == "refuse"
