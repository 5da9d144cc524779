"""The links of the pages lead somewhere, and a link that does not is found."""

import check_links


def test_the_links_of_the_repository():
    pages = check_links.pages()
    assert {"README.md", "CONTRIBUTING.md", "training.md"} <= {page.name for page in pages}
    assert sum(len(list(check_links.targets(page))) for page in pages) > 20
    assert [line for page in pages for line in check_links.broken_links(page)] == []


PAGE = """# A page

[there](other.md), [its heading](other.md#two-words-and-code), [the second](other.md#twice-1),
[up](#a-page), [site](https://example.org/no)
[gone](gone.md) and ![gone too](images/gone.png "title") beside [no heading](other.md#no-heading)
[by name][name] <a href="absent.html">absent</a>

[name]: missing.md#x

`[code](nowhere.md)`

```
[a block of code](nowhere.md)
```

<!-- [a comment](nowhere.md) -->
"""
OTHER = "# Two words, and `code`\n\n## Twice\n\n## Twice\n\n```\n# no heading\n```\n"


def test_broken_links_are_found(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    (tmp_path / "other.md").write_text(OTHER)
    assert check_links.main([str(page)]) == 1
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line.removeprefix(f"{page}:") for line in lines] == [
        "5: gone.md: no such file",
        "5: images/gone.png: no such file",
        "5: other.md#no-heading: no such heading",
        "6: absent.html: no such file",
        "8: missing.md#x: no such file",
    ]
    assert last == "1 pages, 5 broken links"
