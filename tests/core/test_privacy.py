from omegaconf import OmegaConf

from pylorus.core.privacy import format_redacted_yaml, redact_override, redact_overrides


def test_folders_are_removed_from_configurations_and_command_lines():
    config = OmegaConf.create(
        {
            "data": {"root": "relative_name", "group": r"p/(\d+)", "classes": ["a", "b"]},
            "model": {"weights": r"C:\Users\Li Wei\w.pth", "args": {"path": "~/x"}},
            "seed": 3,
        }
    )
    text = format_redacted_yaml(config, names=False)
    assert OmegaConf.to_container(OmegaConf.create(text)) == {
        "data": {"root": "(not shown)", "group": r"p/(\d+)", "classes": ["a", "b"]},
        "model": {"weights": "w.pth", "args": {"path": "(not shown)"}},
        "seed": 3,
    }
    assert redact_override("+hydra.run.dir=/home/li") == "+hydra.run.dir=(not shown)"


def test_a_value_of_a_column_that_makes_a_fold_is_not_shown_and_the_number_of_a_fold_is():
    words = ["data.fold=17", "data.fold_column=case", "seed=1"]
    assert redact_overrides(words) == ["data.fold=(not shown)", "data.fold_column=case", "seed=1"]
    assert redact_overrides(["data.fold=1"]) == ["data.fold=1"]
    for fold, shown in (("17", "(not shown)"), (1, 1)):
        text = format_redacted_yaml(OmegaConf.create({"data": {"fold": fold}}), names=False)
        assert OmegaConf.create(text).data.fold == shown


def test_with_names_the_configuration_is_unchanged():
    config = OmegaConf.create({"data": {"root": "/patients"}})
    assert "/patients" in format_redacted_yaml(config, names=True)
