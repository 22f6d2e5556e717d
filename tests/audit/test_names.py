"""Class names: texts, no two alike."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from audit.common import made, rows, small
from tracin.audit import find_label_issues
from tracin.audit.names import problem_of, unique_names
from tracin.errors import OptionError, ResultError


@given(st.lists(st.sampled_from(["a", "a (0)", "a (1)", "a (0) (0)", "b"]), max_size=7))
def test_names_differ_and_those_that_differed_stay(names):
    found = unique_names(names)
    assert len(set(found)) == len(names)
    for name, new in zip(names, found, strict=True):
        assert new.startswith(name)
    if len(set(names)) == len(names):
        assert found == tuple(names)


def test_a_name_that_a_number_would_make_gets_its_own():
    assert unique_names(["cat", "cat", "cat (0)"]) == ("cat (0) (0)", "cat (1)", "cat (0) (2)")


@pytest.mark.parametrize(
    ("names", "fact"),
    [
        (["ant", None, "fly"], r"class_names\[1\] is None, a NoneType: give texts, such as 'None'"),
        ([2, 1, 0], r"class_names\[0\] is 2, an int: give texts, such as '2'"),
        (["ant", "bee", "\ud83d"], r"class_names\[2\] is '\\ud83d'.*half of a surrogate pair"),
        ({"ant": 0}, "class_names is a dict"),
        ({"ant", "bee", "fly"}, "class_names is a set"),
        (iter(["ant"]), "class_names is a list_iterator"),
        (3, "class_names is a int"),
        (b"ants", "class_names is a bytes"),
    ],
)
def test_what_is_no_list_of_names(names, fact):
    problem = problem_of(names)
    assert problem is not None
    with pytest.raises(AssertionError, match=fact):
        raise AssertionError(problem)


def test_names_are_held_to_it_everywhere():
    with pytest.raises(OptionError, match="half of a surrogate pair"):
        find_label_issues(small(), rows(), class_names=["ant", "bee", "\udc00"], evidence=0)
    with pytest.raises(ResultError, match="half of a surrogate pair"):
        made(class_names=("ant", "bee", "\udc00"))
    audit = find_label_issues(small(), rows(), class_names=["cat", "dog", "cat"], evidence=0)
    assert audit.class_names == ("cat (0)", "dog", "cat (2)")
    assert set(audit.table["given_label"]) <= {"cat (0)", "dog", "cat (2)"}


def test_names_of_other_libraries_are_texts():
    assert problem_of(np.array(["ant", "bee"])) is None
    assert made(class_names=tuple(np.array(["ant", "bee", "fly"]))).class_names == ("ant", "bee", "fly")
