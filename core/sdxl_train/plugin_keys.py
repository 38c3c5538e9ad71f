"""The table that ties each TOML key that names plugins to the hooks that its plugins answer."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["pick", "chain", "collect", "event"]


@dataclass(frozen=True)
class PluginKey:
    """One TOML key whose value names plugins.

    Attributes:
        key: the TOML key; the entry-point group is `sdxl_train.<key>`.
        kind: pick = exactly one plugin answers; chain = each gets the last answer; collect = the core combines; event = all are told.
        hooks: the hooks the plugins of this key answer; at least one of them must be implemented.
        default: what is used when the file does not name any.
        shape: "name" (one name), "list" (always a list) or "name or list".
        help, zh: one sentence for the configuration page.
        ignores_case: names are compared without regard to case.
        other_names, other_names_pattern: which further values there are, as words and as a regular expression; empty: none.
    """

    key: str
    kind: Kind
    hooks: tuple[str, ...]
    default: tuple[str, ...]
    shape: Literal["name", "list", "name or list"]
    help: str
    zh: str
    ignores_case: bool = False
    other_names: str = ""
    other_names_pattern: str = ""

    @property
    def group(self) -> str:
        return f"sdxl_train.{self.key}"

    @property
    def options_key(self) -> str:
        """The TOML table with the options of this key's plugins: the key without a final `_type`, plus `_kwargs`."""
        return self.key.removesuffix("_type") + "_kwargs"


EVENTS = (
    "on_train_start",
    "on_epoch_start",
    "on_step_end",
    "on_epoch_end",
    "on_save",
    "on_sample",
    "on_log",
    "on_train_end",
)

PLUGIN_KEYS: dict[str, PluginKey] = {
    row.key: row
    for row in (
        PluginKey(
            "num_repeats_getter", "pick", ("count_repeats",), ("one",), "name",
            "How often each picture is trained per epoch; 0 leaves it out. Absent: once each.", "每张图每轮的重复次数；0 表示不参与训练。缺省为 1。",
        ),
        PluginKey(
            "caption_processor", "chain", ("process_caption",), (), "name or list",
            "Rewrites the tag caption at every fetch; a list is applied in its order. Absent: unchanged.", "每次取出数据时处理标签标注；列表按顺序执行。缺省为不处理。",
        ),
        PluginKey(
            "description_processor", "chain", ("process_description",), (), "name or list",
            "Rewrites the natural-language description at every fetch. Absent: unchanged.", "每次取出数据时处理自然语言描述。缺省为不处理。",
        ),
        PluginKey(
            "optimizer_type", "pick", ("build_optimizer",), ("AdaFactor",), "name",
            "The optimizer, upper and lower case the same; also any class of pytorch_optimizer or torch.optim, and package.Class.", "优化器类型，不区分大小写；也可为 pytorch_optimizer 或 torch.optim 的任意类名，或 package.Class。", ignores_case=True,
            other_names="any class of pytorch_optimizer or torch.optim by its name; package.Class",
            other_names_pattern=r"^[A-Za-z_][\w.]*$",
        ),
        PluginKey(
            "lr_scheduler", "pick", ("build_lr_scheduler",), ("constant_with_warmup",), "name",
            "How the learning rate changes over the steps; also adafactor:<initial learning rate>.", "学习率调度器；也可为 adafactor:<初始学习率>。",
            other_names="adafactor:<initial learning rate>", other_names_pattern="^adafactor:.",
        ),
        PluginKey(
            "timestep_sampler_type", "pick", ("sample_timesteps",), ("uniform",), "name",
            "The distribution from which timesteps are drawn.", "时间步采样类型。",
        ),
        PluginKey(
            "noise_strategies", "chain", ("shape_noise", "shape_input_noise"), ("noise_offset", "multires_noise", "ip_noise"), "list",
            "What shapes the noise, in this order; a list in the file replaces the default.", "依次处理噪声的策略；文件中的列表会替换默认值。",
        ),
        PluginKey(
            "loss_type", "pick", ("compute_loss",), ("mse",), "name",
            "The loss of each sample.", "单个样本的损失函数。",
        ),
        PluginKey(
            "loss_weightings", "collect", ("weigh_loss",), ("min_snr", "scale_v_pred", "v_pred_like", "debiased"), "list",
            "Factors on the loss of each sample; they are multiplied.", "各样本损失的权重；相乘生效。",
        ),
        PluginKey(
            "save_triggers", "collect", ("should_save",), ("steps", "epochs", "train_end", "keyboard_interrupt", "exception"), "list",
            "When to save; one reason is enough.", "何时保存；任一条件满足即保存。",
        ),
        PluginKey(
            "sample_triggers", "collect", ("should_sample",), ("steps", "epochs"), "list",
            "When to render the sample benchmark.", "何时采样。",
        ),
        PluginKey(
            "sample_sampler", "pick", ("build_sampler",), ("euler_a",), "name",
            "The sampler that renders samples.", "采样器。",
        ),
        PluginKey(
            "trackers", "event", EVENTS, ("tensorboard", "jsonl"), "list",
            "Where the training metrics are written.", "训练指标的记录方式。",
        ),
        PluginKey(
            "plugins", "event", ("should_stop", "checkpoint_metadata", *EVENTS), (), "list",
            "Further plugins: observers and wrappers of any hook.", "其他插件：观察者与任意钩子的包装器。",
        ),
    )
}

# Answered by plugins of any key, whatever key selected them.
COLLECT_HOOKS = ("weigh_loss", "should_save", "should_sample", "should_stop", "checkpoint_metadata")
PICK_HOOKS = tuple(hook for row in PLUGIN_KEYS.values() if row.kind == "pick" for hook in row.hooks)
CHAIN_HOOKS = tuple(hook for row in PLUGIN_KEYS.values() if row.kind == "chain" for hook in row.hooks)


def key_of_hook(hook: str) -> PluginKey | None:
    """The key whose plugins answer a pick or chain hook; None for collects and events, which every plugin may answer."""
    return next((row for row in PLUGIN_KEYS.values() if hook in row.hooks and row.kind in ("pick", "chain")), None)
