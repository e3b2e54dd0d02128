"""The forms for issues, by GitHub's rules for them: https://docs.github.com/en/communities (syntax for issue forms)."""

import re
from pathlib import Path

import pytest
import yaml

GITHUB = Path(__file__).resolve().parents[2] / ".github"
FORMS = sorted((GITHUB / "ISSUE_TEMPLATE").glob("[!c]*.yml"))
KINDS = {
    "markdown": {"value"},
    "textarea": {"label", "description", "render"},
    "checkboxes": {"label", "description", "options"},
    "dropdown": {"label", "description", "options"},
}


def test_forms_are_there():
    assert [path.stem for path in FORMS] == ["bug", "feature"]


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.stem)
def test_form_is_as_github_wants_it(form):
    content = yaml.safe_load(form.read_text())
    assert content.keys() == {"name", "description", "labels", "body"} and len(content["description"]) < 200
    fields = [field for field in content["body"] if field["type"] != "markdown"]
    for field in content["body"]:
        assert field.keys() <= {"type", "id", "attributes", "validations"}
        assert field["attributes"].keys() <= KINDS[field["type"]]
    assert all(re.fullmatch(r"[\w-]+", field["id"]) and field["attributes"]["label"] for field in fields)
    for key in (lambda field: field["id"], lambda field: field["attributes"]["label"]):
        assert len({key(field) for field in fields}) == len(fields) > 0
    for field in fields:
        options = field["attributes"].get("options", [])
        assert all(option["label"] if field["type"] == "checkboxes" else isinstance(option, str) for option in options)
        assert bool(options) == (field["type"] in ("checkboxes", "dropdown"))


@pytest.mark.parametrize("page", sorted(GITHUB.glob("*.md")), ids=lambda path: path.stem)
def test_links_of_page_resolve(page):
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert "://" in link or (page.parent / link).exists(), link
