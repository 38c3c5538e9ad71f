"""Plugins are found by entry point, path or file, checked before they are used, and named when they fail."""

import pickle
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sdxl_train import ImageInfo, PluginError
from sdxl_train.plugin_discovery import Catalogue
from sdxl_train.plugin_keys import PLUGIN_KEYS
from sdxl_train.plugins import Choice, Plugins
from sdxl_train.randomness import FetchRandom, StepRandom, sample_place

HEADER = "from sdxl_train import Options, hookimpl, option\nimport torch, random\n"
COUNTER = {"artist": {}, "characters": {}, "styles": {}, "quality": {}}


@pytest.fixture
def write(tmp_path: Path):
    """Writes a plugin file and gives back a function that makes its TOML name from an attribute."""

    def writing(code: str, name: str = "mine"):
        (tmp_path / f"{name}.py").write_text(HEADER + code)
        return lambda attribute: f"{tmp_path / name}.py:{attribute}"

    return writing


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Installs a distribution by hand: a module and a dist-info folder on sys.path."""

    def installing(distribution: str, module: str, code: str, entry_points: str) -> None:
        site = tmp_path / distribution
        info = site / f"{distribution}-1.2.dist-info"
        info.mkdir(parents=True)
        (site / f"{module}.py").write_text(HEADER + code)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(entry_points)
        monkeypatch.syspath_prepend(str(site))

    return installing


def info(caption: str | None = "a, b", description: str | None = None) -> ImageInfo:
    return ImageInfo("pic", {}, caption, description, (64, 64), (64, 64), (8, 8), (64, 64), 1, None, "pic.png")


def caption_of(plugins: Plugins, caption: str = "a, b", flip_aug: bool = False, random: FetchRandom | None = None) -> str:
    return plugins.hooks.process_caption(
        img_info=info(caption), counter=COUNTER, flip_aug=flip_aug, random=random or FetchRandom("fetch", "process_caption")
    )


def batch(size: int = 2) -> SimpleNamespace:
    return SimpleNamespace(keys=[f"k{i}" for i in range(size)], places=[sample_place(1, 1, f"k{i}", 0) for i in range(size)])


def timesteps_of(plugins: Plugins, size: int = 2) -> torch.Tensor:
    one = batch(size)
    return plugins.hooks.sample_timesteps(
        batch_size=size, min_timestep=0, max_timestep=1000, batch=one, random=StepRandom(one.places, "sample_timesteps")
    )


# ---- Finding ----


def test_a_plugin_is_found_by_the_entry_point_of_its_key(install) -> None:
    install("acme", "acme_steps", "class Low:\n    @hookimpl\n    def sample_timesteps(self, batch_size):\n        return torch.zeros(batch_size, dtype=torch.int64)\n",
            "[sdxl_train.timestep_sampler_type]\nlow = acme_steps:Low\n")  # fmt: skip
    assert timesteps_of(Plugins([Choice("timestep_sampler_type", "low")], 1)).tolist() == [0, 0]


def test_what_is_installed_but_not_named_is_not_imported(install, tmp_path: Path) -> None:
    marker = tmp_path / "imported"
    install("acme", "acme_marker", f"open({str(marker)!r}, 'w').close()\n", "[sdxl_train.plugins]\nmarker = acme_marker:Any\n")
    Plugins([Choice("timestep_sampler_type", "uniform")], 1)
    assert not marker.exists()


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(PluginError, match=r'no installed plugin has this name; did you mean "uniform"\? \(known: .*logit_normal'):
        Plugins([Choice("timestep_sampler_type", "unifrom")], 1)


def test_one_name_in_two_distributions_names_both(install) -> None:
    for distribution in ("acme", "bolt"):
        install(distribution, f"{distribution}_x", "", f"[sdxl_train.plugins]\nsame = {distribution}_x:X\n")
    with pytest.raises(PluginError, match=r"(acme 1\.2 and bolt 1\.2|bolt 1\.2 and acme 1\.2)"):
        Plugins([Choice("plugins", "same")], 1)


def test_a_plugin_that_cannot_be_imported_names_distribution_version_entry_point_key_and_cause(install) -> None:
    install("acme", "acme_broken", "import nothing_of_this_name\n", "[sdxl_train.plugins]\nbroken = acme_broken:X\n")
    with pytest.raises(PluginError) as caught:
        Plugins([Choice("plugins", "broken")], 1)
    for part in ("plugins", "broken", "acme 1.2", "acme_broken:X", "nothing_of_this_name"):
        assert part in str(caught.value)


def test_a_module_is_named_by_its_import_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "my_captions.py").write_text("def shout(img_info, **kwargs):\n    return img_info.caption.upper()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert caption_of(Plugins([Choice("caption_processor", "my_captions:shout")], 1)) == "A, B"


def test_a_file_is_imported_once_and_again_after_a_failure(write, tmp_path: Path) -> None:
    name = write("raise RuntimeError('not today')")
    for _ in range(2):
        with pytest.raises(PluginError, match="not today"):
            Plugins([Choice("caption_processor", name("f"))], 1)


def test_a_file_without_the_named_attribute_is_shown_by_its_path(write) -> None:
    name = write("def shuffle(img_info, **kwargs): return ''\n")
    with pytest.raises(PluginError) as caught:
        Plugins([Choice("caption_processor", name("shufle"))], 1)
    assert f'{name("").removesuffix(":")} has no attribute shufle; did you mean "shuffle"?' in str(caught.value)
    assert "sdxl_train_file" not in str(caught.value)


@pytest.mark.parametrize(("code", "said"), [("f = 3", "a plugin is a class or a function"), ("", "no attribute")])
def test_a_name_that_is_no_plugin_is_refused(write, code: str, said: str) -> None:
    with pytest.raises(PluginError, match=said):
        Plugins([Choice("caption_processor", write(code)("f"))], 1)


# ---- What a plugin may answer ----


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("def proces_caption(self, img_info): return ''", "there is no hook proces_caption; did you mean process_caption"),
        ("def process_caption(self, img_info, extra): return ''", "process_caption has no argument extra"),
        ("def sample_timesteps(self, batch_size): return None", "belongs to timestep_sampler_type"),
        ("def on_train_start(self, run): pass", "answers none of the hooks of caption_processor"),
    ],
)
def test_a_hook_that_cannot_be_right_is_refused_when_the_plugin_is_loaded(write, body: str, said: str) -> None:
    with pytest.raises(PluginError, match=said):
        Plugins([Choice("caption_processor", write(f"class P:\n    @hookimpl\n    {body}\n")("P"))], 1)


def test_a_method_without_the_marker_is_not_an_answer(write) -> None:
    name = write("class P:\n    def process_caption(self, img_info): return ''\n")
    with pytest.raises(PluginError, match="is it marked @hookimpl"):
        Plugins([Choice("caption_processor", name("P"))], 1)


def test_two_answers_to_one_pick_name_both(write) -> None:
    name = write("def f(batch_size, **kwargs): return None\n")
    with pytest.raises(PluginError, match="two answers: .*uniform.* and .*mine.py:f"):
        Plugins([Choice("timestep_sampler_type", "uniform"), Choice("timestep_sampler_type", name("f"))], 1)


def test_the_same_class_under_two_keys_is_two_instances_with_their_own_options(write) -> None:
    name = write(
        "class P:\n    class Options(Options):\n        word: str = option('x', 'a word')\n    def __init__(self, options): self.word = options.word\n"
        "    @hookimpl\n    def on_train_start(self, run): run.append(self)\n"
    )
    told: list = []
    choices = [Choice("trackers", name("P"), {"word": "!"}), Choice("plugins", name("P"), {"word": "?"})]
    Plugins(choices, 1).hooks.on_train_start(run=told)
    assert told[0] is not told[1] and [plugin.word for plugin in told] == ["!", "?"]


@pytest.mark.parametrize("answer", ["None", "3", "b'x'"])
def test_a_caption_that_is_no_str_names_plugin_hook_and_datum(write, answer: str) -> None:
    name = write(f"def f(img_info, **kwargs): return {answer}\n")
    with pytest.raises(PluginError, match=r"mine\.py:f.*process_caption for 'pic' wrongly: expected a str, got"):
        caption_of(Plugins([Choice("caption_processor", name("f"))], 1))


@pytest.mark.parametrize("answer", ["None", "True", "-1", "1.0", "'2'"])
def test_repeats_that_are_no_count_are_refused(write, answer: str) -> None:
    plugins = Plugins([Choice("num_repeats_getter", write(f"def f(img_key, img_md, **kwargs): return {answer}\n")("f"))], 1)
    with pytest.raises(PluginError, match="for 'pic' wrongly: expected an integer >= 0"):
        plugins.hooks.count_repeats(img_key="pic", img_md={}, counter=COUNTER)


def test_numpy_integers_count_as_repeats(write) -> None:
    name = write("import numpy\ndef f(img_key, img_md, **kwargs): return numpy.int64(3)\n")
    assert Plugins([Choice("num_repeats_getter", name("f"))], 1).hooks.count_repeats(img_key="pic", img_md={}, counter=COUNTER) == 3


@pytest.mark.parametrize(
    "answer", ["None", "[1, 2]", "torch.zeros(2)", "torch.zeros(3, dtype=torch.int64)", "torch.full((2,), 1000)", "torch.full((2,), -1)"]
)
def test_timesteps_of_a_wrong_shape_dtype_or_range_are_refused(write, answer: str) -> None:
    plugins = Plugins([Choice("timestep_sampler_type", write(f"def f(batch_size, **kwargs): return {answer}\n")("f"))], 1)
    with pytest.raises(PluginError, match=r"int64 timesteps of shape \[2\] in \[0, 1000\)"):
        timesteps_of(plugins)


@pytest.mark.parametrize(
    "answer", ["None", "1.0", "model_pred.mean()", "model_pred.detach().mean((1,2,3))", "model_pred.double().mean((1,2,3))"]
)
def test_a_loss_must_be_one_attached_float32_per_sample(write, answer: str) -> None:
    plugins = Plugins([Choice("loss_type", write(f"def f(model_pred, target, **kwargs): return {answer}\n")("f"))], 1)
    prediction = torch.ones(2, 4, 2, 2, requires_grad=True)
    with pytest.raises(PluginError, match="one loss per sample"):
        plugins.hooks.compute_loss(model_pred=prediction, target=prediction, timesteps=torch.zeros(2), batch=batch(), snr=torch.ones(2))


def test_none_is_no_factor(write) -> None:
    plugins = Plugins([Choice("loss_weightings", write("def f(snr, **kwargs): return None\n")("f"))], 1)
    with pytest.raises(PluginError, match="one factor per sample"):
        plugins.hooks.weigh_loss(timesteps=torch.zeros(2), snr=torch.ones(2), prediction_type="epsilon", batch=batch())


def test_an_exception_names_plugin_hook_and_datum_and_keeps_its_cause(write) -> None:
    name = write("def f(img_info, **kwargs): return 1 / 0\n")
    with pytest.raises(PluginError, match=r"mine\.py:f.*raised in process_caption for 'pic': ZeroDivisionError") as caught:
        caption_of(Plugins([Choice("caption_processor", name("f"))], 1))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_tracker_that_raises_is_told_once_and_ends_nothing(write, caplog: pytest.LogCaptureFixture) -> None:
    name = write("class T:\n    @hookimpl\n    def on_log(self, run, metrics): raise RuntimeError('no disk')\n")
    plugins = Plugins([Choice("trackers", name("T"))], 1)
    for _ in range(3):
        plugins.hooks.on_log(run=None, metrics={})
    assert caplog.text.count("no disk") == 1


def test_a_plugin_that_raises_in_an_event_is_an_error(write) -> None:
    name = write("class P:\n    @hookimpl\n    def on_log(self, run, metrics): raise RuntimeError('no disk')\n")
    with pytest.raises(PluginError, match="no disk"):
        Plugins([Choice("plugins", name("P"))], 1).hooks.on_log(run=SimpleNamespace(step=3), metrics={})


# ---- Functions ----


def test_a_wiki_style_function_gets_the_documented_arguments(write) -> None:
    name = write(
        "def getter(img_key, img_md, **kwargs):\n    return len(kwargs['counter']) + len(img_key) + len(img_md)\n"
        "def caption(img_info, **kwargs):\n    return f\"{img_info.key} {kwargs['flip_aug']} {sorted(kwargs['counter'])} {kwargs['random'].random() < 1}\"\n"
    )
    plugins = Plugins([Choice("num_repeats_getter", name("getter")), Choice("caption_processor", name("caption"))], 1)
    assert plugins.hooks.count_repeats(img_key="pic", img_md={"a": 1}, counter=COUNTER) == 4 + 3 + 1
    assert caption_of(plugins, flip_aug=True) == "pic True ['artist', 'characters', 'quality', 'styles'] True"


def test_keyword_only_parameters_with_a_default_are_options(write) -> None:
    name = write("def f(img_info, *, suffix: str = '?', times: int = 1, **kwargs):\n    return img_info.caption + suffix * times\n")
    assert caption_of(Plugins([Choice("caption_processor", name("f"), {"times": 3})], 1)) == "a, b???"


@pytest.mark.parametrize(
    ("signature", "said"),
    [
        ("img_info, *, flip_aug=False", "option flip_aug is named like an argument"),
        ("img_info, strength=1.0, **kwargs", "parameter strength is not an argument"),
        ("info, **kwargs", "parameter info is not an argument"),
    ],
)
def test_a_function_with_another_signature_is_refused_at_start_up(write, signature: str, said: str) -> None:
    with pytest.raises(PluginError, match=said):
        Plugins([Choice("caption_processor", write(f"def f({signature}): return ''\n")("f"))], 1)


def test_a_key_with_several_hooks_needs_a_class(write) -> None:
    with pytest.raises(PluginError, match="a class is needed"):
        Plugins([Choice("noise_strategies", write("def f(noise, **kwargs): return noise\n")("f"))], 1)


def test_functions_that_use_global_generators_are_reproducible_and_leave_them_alone(write) -> None:
    name = write("import numpy\ndef f(img_info, **kwargs): return f'{random.random()} {numpy.random.rand()}'\n")
    plugins = Plugins([Choice("caption_processor", name("f"))], 1)
    before = global_states()
    first = caption_of(plugins, random=FetchRandom("fetch", 1))
    assert global_states() == before
    assert caption_of(plugins, random=FetchRandom("fetch", 1)) == first
    assert caption_of(plugins, random=FetchRandom("fetch", 2)) != first


DRAWING = """
import numpy
def f(img_key, img_md, **kwargs):
    if img_md: raise ValueError
    return int(random.random() * 2 ** 40) ^ int(numpy.random.rand() * 2 ** 40)
"""


def global_states() -> tuple[object, ...]:
    numpy_state = np.random.get_state()
    return random.getstate(), numpy_state[1].tolist(), numpy_state[2:]  # pyright: ignore[reportAttributeAccessIssue]


def test_among_many_calls_a_function_draws_what_it_draws_alone(write) -> None:
    plugins = Plugins([Choice("num_repeats_getter", write(DRAWING)("f"))], 1)

    def repeats(key: str) -> int:
        return plugins.hooks.count_repeats(img_key=key, img_md={}, counter=COUNTER)

    before = global_states()
    alone = {key: repeats(key) for key in "abc"}
    assert global_states() == before and len(set(alone.values())) == 3
    with plugins.many_calls("num_repeats_getter"):
        assert {key: repeats(key) for key in "cba"} == alone
        with plugins.many_calls("num_repeats_getter"):
            assert repeats("b") == alone["b"]
        assert repeats("b") == alone["b"]
    assert global_states() == before
    assert repeats("a") == alone["a"]
    assert global_states() == before


def test_the_global_generators_are_put_back_when_one_of_many_calls_raises(write) -> None:
    plugins = Plugins([Choice("num_repeats_getter", write(DRAWING)("f"))], 1)
    before = global_states()
    with pytest.raises(PluginError, match="ValueError"), plugins.many_calls("num_repeats_getter"):
        plugins.hooks.count_repeats(img_key="a", img_md={}, counter=COUNTER)
        plugins.hooks.count_repeats(img_key="b", img_md={"caption": "c"}, counter=COUNTER)
    assert global_states() == before
    plugins.hooks.count_repeats(img_key="a", img_md={}, counter=COUNTER)
    assert global_states() == before


# ---- Chains and wrappers ----

CHAIN = """
def one(img_info, **kwargs): return img_info.caption + ' one'
def two(img_info, **kwargs): return img_info.caption + ' two'
class W:
    @hookimpl(wrapper=True)
    def process_caption(self, img_info):
        text = yield
        return f'[{text}]'
"""


def test_a_chain_runs_in_the_order_of_the_list_and_a_wrapper_once_around_it(write) -> None:
    name = write(CHAIN)
    choices = [Choice("caption_processor", name("two")), Choice("caption_processor", name("one")), Choice("plugins", name("W"))]
    assert caption_of(Plugins(choices, 1)) == "[a, b two one]"


def test_a_wrapper_runs_around_an_empty_chain_too(write) -> None:
    assert caption_of(Plugins([Choice("plugins", write(CHAIN)("W"))], 1)) == "[a, b]"


def test_adding_a_wrapper_that_draws_changes_no_draw(write) -> None:
    name = write(
        "class W:\n    @hookimpl(wrapper=True)\n    def sample_timesteps(self, random):\n"
        "        random.stream('W').normal(3); random.normal(2)\n        answer = yield\n        random.stream('W').normal(3)\n        return answer\n"
    )
    plain = timesteps_of(Plugins([Choice("timestep_sampler_type", "uniform")], 1))
    wrapped = timesteps_of(Plugins([Choice("timestep_sampler_type", "uniform"), Choice("plugins", name("W"))], 1))
    assert plain.tolist() == wrapped.tolist()


def test_each_member_of_a_chain_draws_from_its_own_stream(write) -> None:
    code = "def {0}(img_info, **kwargs): return img_info.caption + ' ' + str(kwargs['random'].random())\n"
    name = write(code.format("one") + code.format("two"))
    both = caption_of(Plugins([Choice("caption_processor", name("one")), Choice("caption_processor", name("two"))], 1), "")
    alone = caption_of(Plugins([Choice("caption_processor", name("two"))], 1), "")
    assert both.split()[1] == alone.split()[0] and both.split()[0] != both.split()[1]


def test_a_wrapper_that_spoils_an_answer_is_named(write) -> None:
    name = write("class W:\n    @hookimpl(wrapper=True)\n    def process_caption(self):\n        yield\n        return None\n")
    with pytest.raises(PluginError, match=r"wrapper of process_caption .*mine\.py:W.* expected a str, got None"):
        caption_of(Plugins([Choice("plugins", name("W"))], 1))


def test_a_wrapper_that_raises_is_named(write) -> None:
    name = write("class W:\n    @hookimpl(wrapper=True)\n    def process_caption(self):\n        yield\n        raise KeyError('x')\n")
    with pytest.raises(PluginError, match=r"mine\.py:W.*raised in process_caption for 'pic': KeyError"):
        caption_of(Plugins([Choice("plugins", name("W"))], 1))


def test_wrappers_work_on_every_hook(write) -> None:
    from sdxl_train.plugins import HOOK_NAMES

    body = "\n".join(f"    @hookimpl(wrapper=True)\n    def {hook}(self):\n        return (yield)" for hook in HOOK_NAMES)
    plugins = Plugins([Choice("plugins", write(f"class W:\n{body}\n")("W"))], 1)
    for hook in HOOK_NAMES:
        (wrapper,) = (impl for impl in getattr(plugins.hooks, hook).get_hookimpls() if impl.wrapper)
        assert wrapper.function.__name__ == hook


# ---- Travelling ----


def test_plugins_are_rebuilt_by_name_and_options_on_instances_of_their_own(write) -> None:
    name = write("class P:\n    class Options(Options):\n        n: int = option(1, 'n')\n    def __init__(self, options): self.n = options.n\n"
                 "    @hookimpl\n    def process_caption(self, img_info): self.n += 1; return str(self.n)\n")  # fmt: skip
    plugins = Plugins([Choice("caption_processor", name("P"), {"n": 5})], 1)
    assert caption_of(plugins) == "6"
    assert caption_of(pickle.loads(pickle.dumps(plugins))) == "6"
    assert caption_of(plugins.rebuilt()) == "6"
    assert caption_of(plugins) == "7"


def test_every_built_in_loads_with_its_defaults_without_importing_torch() -> None:
    import subprocess

    code = (
        "import sys\nfrom sdxl_train.plugin_discovery import Catalogue\nfrom sdxl_train.plugin_keys import PLUGIN_KEYS\n"
        "from sdxl_train.plugins import options_of\ncatalogue = Catalogue()\n"
        "for key in PLUGIN_KEYS.values():\n    for name in catalogue.names(key):\n        options_of(catalogue.find(key, name))\n"
        "print(sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_the_defaults_of_every_key_are_installed() -> None:
    catalogue = Catalogue()
    for key in PLUGIN_KEYS.values():
        assert set(key.default) <= set(catalogue.names(key)), key.key
