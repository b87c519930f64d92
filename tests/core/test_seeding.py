from pylorus.core.distributed import compute_seed


def test_seeds_are_the_same_on_every_machine():
    assert compute_seed(0, "order", 1) == 7021862330116196507


def test_seeds_tell_numbers_from_words_and_parts_from_each_other():
    seeds = {compute_seed("ab", "c"), compute_seed("a", "bc"), compute_seed(1), compute_seed("1"), compute_seed(1, 2)}
    assert len(seeds) == 5
