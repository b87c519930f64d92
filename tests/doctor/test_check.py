"""A check as a line: it travels between processes, and a check that fails is a line itself."""

from pylorus.doctor.check import Check, State, get_worst_state, run_guarded

FINE = Check("area", "thing", State.GOOD, "there, 3 × ü")


def test_a_check_comes_back_from_json_as_it_was():
    assert Check.from_json(FINE.to_json()) == FINE
    assert "\n" not in Check("area", "thing", State.WRONG, "two\nlines").to_json()


def test_one_wrong_line_outweighs_all_warnings():
    lines = [FINE, Check("a", "b", State.WARNING, "c"), Check("a", "b", State.WRONG, "c"), FINE]
    assert get_worst_state(lines) is State.WRONG
    assert get_worst_state(lines[:2]) is State.WARNING
    assert get_worst_state([]) is State.GOOD


def test_a_check_that_breaks_off_keeps_what_it_found_and_adds_a_wrong_line():
    def breaks():
        yield FINE
        raise RuntimeError("first line\nsecond line")

    first, second = run_guarded("area", "what", breaks)
    assert first == FINE
    assert second.state is State.WRONG
    assert second.found == "the check itself failed: RuntimeError: first line"
