from pylorus.chance import derived_seed


def test_seeds_are_the_same_on_every_machine():
    assert derived_seed(0, "order", 1) == 7021862330116196507


def test_seeds_tell_numbers_from_words_and_parts_from_each_other():
    seeds = {derived_seed("ab", "c"), derived_seed("a", "bc"), derived_seed(1), derived_seed("1"), derived_seed(1, 2)}
    assert len(seeds) == 5
