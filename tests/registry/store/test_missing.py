from pathlib import Path

import pytest

from lorary.domains.errors import NotFoundError
from lorary.registry.store.missing import no_such_domain, no_such_store, no_such_version


@pytest.mark.parametrize(
    ("error", "message", "cause", "fix"),
    [
        (no_such_store(Path("/s")), "There is no store in /s.", None, "Make one: registry init --store /s"),
        (
            no_such_domain("leagl", known=["legal", "tax"]),
            "There is no domain named 'leagl'.",
            "Known domains: legal, tax.",
            "Did you mean legal?",
        ),
        (
            no_such_domain("zoo", known=[]),
            "There is no domain named 'zoo'.",
            "Known domains: none.",
            "Add it: registry add-domain zoo --data FILE",
        ),
        (
            no_such_domain("medicine", known=[]),
            "There is no domain named 'medicine'.",
            "Known domains: none.",
            "Add it: registry add-domain medicine",
        ),
        (
            no_such_version("legal", "lates", versions=[1, 2], aliases={"latest": 2}),
            "There is no legal@lates.",
            "Known versions: 1, 2. Aliases: latest = 2.",
            "Did you mean latest?",
        ),
        (
            no_such_version("legal", 7, versions=[1], aliases={}),
            "There is no legal@7.",
            "Known versions: 1. Aliases: none.",
            "See what there is: registry show legal",
        ),
    ],
)
def test_error_says_what_is_there_and_what_helps(error, message, cause, fix):
    assert isinstance(error, NotFoundError)
    assert (error.message, error.cause, error.fix) == (message, cause, fix)


def test_long_list_is_cut_and_the_rest_counted():
    error = no_such_domain("zoo", known=[f"d{i}" for i in range(10_000)])

    assert str(error.cause).endswith("d19 and 9980 more.")
