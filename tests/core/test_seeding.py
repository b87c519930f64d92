from pylorus.core.distributed import compute_seed


def test_seeds_are_the_same_on_every_machine():
    assert compute_seed(0, "order", 1) == 7021862330116196507


def test_seeds_distinguish_types_and_boundaries_of_their_parts():
    seeds = {compute_seed("ab", "c"), compute_seed("a", "bc"), compute_seed(1), compute_seed("1"), compute_seed(1, 2)}
    assert len(seeds) == 5
