"""The samplers that render the benchmark: schedulers of diffusers on the schedule that is trained, with the library's defaults otherwise.

An epsilon model knows nothing at SNR 0, so with `zero_terminal_snr` only velocity models are sampled on the rescaled schedule.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sdxl_train import ConfigError, hookimpl

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_utils import SchedulerMixin


def trained_schedule(noise_scheduler: Any) -> dict[str, Any]:
    """The arguments of any diffusers scheduler that say what was trained, without the rescaling of `zero_terminal_snr`."""
    return {
        "num_train_timesteps": noise_scheduler.num_train_timesteps,
        "beta_start": noise_scheduler.beta_start,
        "beta_end": noise_scheduler.beta_end,
        "beta_schedule": "scaled_linear",
        "prediction_type": noise_scheduler.prediction_type,
    }


def samples_zero_snr(noise_scheduler: Any) -> bool:
    """Whether the samples begin at SNR 0."""
    return noise_scheduler.zero_terminal_snr and noise_scheduler.prediction_type == "v_prediction"


def plain_sampler(name: str, scheduler_class: type[Any], noise_scheduler: Any, **arguments: Any) -> SchedulerMixin:
    """A scheduler of a class that cannot begin at SNR 0.

    Raises:
        ConfigError: the samples would have to begin there.
    """
    if samples_zero_snr(noise_scheduler):
        raise ConfigError(
            f'sample_sampler = "{name}" cannot sample zero_terminal_snr with prediction_type = "v_prediction"; '
            "ddim, ddpm, euler, euler_a, dpmsolver and dpmsolver++ can"
        )
    return scheduler_class(**trained_schedule(noise_scheduler), **arguments)


def zero_snr_sampler(scheduler_class: type[Any], noise_scheduler: Any, **arguments: Any) -> SchedulerMixin:
    """A scheduler of a class that can begin at SNR 0, and does where the trained schedule asks for it.

    The last timestep must then be among those sampled, which only trailing spacing does for all of these classes.
    """
    if not samples_zero_snr(noise_scheduler):
        return scheduler_class(**trained_schedule(noise_scheduler), **arguments)
    arguments = {**arguments, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return exact_trailing(scheduler_class)(**trained_schedule(noise_scheduler), **arguments)


def exact_trailing(scheduler_class: type[Any]) -> type[Any]:
    """The class with as many trailing timesteps as asked for.

    diffusers 0.42 lists them by numpy.arange(1000, 0, -1000 / n), which for 62 values of n (61 is the first) rounds to n + 1 timesteps,
    the last of them -1.
    """
    import torch

    class ExactTrailing(scheduler_class):
        def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
            super().set_timesteps(num_inference_steps, device=device)
            self.timesteps = self.timesteps[:num_inference_steps]
            self.num_inference_steps = num_inference_steps
            if hasattr(self, "sigmas"):  # one a timestep, then the final one
                self.sigmas = torch.cat([self.sigmas[:num_inference_steps], self.sigmas[-1:]])

    return ExactTrailing


class Ddim:
    """Denoising diffusion implicit models (Song et al. 2020, arXiv:2010.02502), without added noise."""

    @hookimpl
    def build_sampler(self, noise_scheduler: Any) -> SchedulerMixin:
        from diffusers.schedulers.scheduling_ddim import DDIMScheduler

        return zero_snr_sampler(DDIMScheduler, noise_scheduler, clip_sample=False)


class Ddpm:
    """Denoising diffusion probabilistic models (Ho et al. 2020, arXiv:2006.11239): the ancestral sampler; wants many steps."""

    @hookimpl
    def build_sampler(self, noise_scheduler: Any) -> SchedulerMixin:
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

        return zero_snr_sampler(DDPMScheduler, noise_scheduler, clip_sample=False)


class Pndm:
    """Pseudo numerical methods (Liu et al. 2022, arXiv:2202.09778)."""

    @hookimpl
    def build_sampler(self, noise_scheduler: Any) -> SchedulerMixin:
        from diffusers.schedulers.scheduling_pndm import PNDMScheduler

        return plain_sampler("pndm", PNDMScheduler, noise_scheduler)


class Lms:
    """Linear multistep method of k-diffusion."""

    @hookimpl
    def build_sampler(self, noise_scheduler: Any) -> SchedulerMixin:
        from importlib.util import find_spec

        if find_spec("scipy") is None:  # diffusers would only say so once a picture is rendered
            raise ConfigError('sample_sampler = "lms" needs the package scipy, which is not installed: pip install scipy')
        from diffusers.schedulers.scheduling_lms_discrete import LMSDiscreteScheduler

        return plain_sampler("lms", LMSDiscreteScheduler, noise_scheduler)


class Euler:
    """Euler's method on the probability flow (Karras et al. 2022, arXiv:2206.00364, algorithm 2)."""

    @hookimpl
    def build_sampler(self, noise_scheduler: Any) -> SchedulerMixin:
        from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler

        return zero_snr_sampler(EulerDiscreteScheduler, noise_scheduler)


class EulerA:
    """Euler's method with ancestral noise, of k-diffusion."""

    @hookimpl
    def build_sampler(self, noise_scheduler: Any) -> SchedulerMixin:
        from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler

        return zero_snr_sampler(EulerAncestralDiscreteScheduler, noise_scheduler)


class DpmSolver:
    """DPM-Solver, multistep, second order (Lu et al. 2022, arXiv:2206.00927)."""

    @hookimpl
    def build_sampler(self, noise_scheduler: Any) -> SchedulerMixin:
        import warnings

        from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # diffusers prefers dpmsolver++; whoever asks for this one gets it
            # It has no step to sigma 0: it works in log(sigma).
            return zero_snr_sampler(DPMSolverMultistepScheduler, noise_scheduler, algorithm_type="dpmsolver", final_sigmas_type="sigma_min")


class DpmSolverPlusPlus:
    """DPM-Solver++, multistep, second order (Lu et al. 2022, arXiv:2211.01095)."""

    @hookimpl
    def build_sampler(self, noise_scheduler: Any) -> SchedulerMixin:
        from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

        return zero_snr_sampler(DPMSolverMultistepScheduler, noise_scheduler, algorithm_type="dpmsolver++")


class DpmSingle:
    """DPM-Solver++, single step, second order (Lu et al. 2022, arXiv:2211.01095)."""

    @hookimpl
    def build_sampler(self, noise_scheduler: Any) -> SchedulerMixin:
        from diffusers.schedulers.scheduling_dpmsolver_singlestep import DPMSolverSinglestepScheduler

        # diffusers turns lower_order_final on by itself, with a warning, because the last step goes to sigma 0.
        return plain_sampler("dpmsingle", DPMSolverSinglestepScheduler, noise_scheduler, lower_order_final=True)


class Heun:
    """Heun's method (Karras et al. 2022, arXiv:2206.00364, algorithm 1 without churn): two U-Net calls a step."""

    @hookimpl
    def build_sampler(self, noise_scheduler: Any) -> SchedulerMixin:
        from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteScheduler

        return plain_sampler("heun", HeunDiscreteScheduler, noise_scheduler, clip_sample=False)


class Dpm2:
    """DPM-Solver-2 of k-diffusion: two U-Net calls a step."""

    @hookimpl
    def build_sampler(self, noise_scheduler: Any) -> SchedulerMixin:
        from diffusers.schedulers.scheduling_k_dpm_2_discrete import KDPM2DiscreteScheduler

        return plain_sampler("dpm_2", KDPM2DiscreteScheduler, noise_scheduler)


class Dpm2A:
    """DPM-Solver-2 with ancestral noise, of k-diffusion."""

    @hookimpl
    def build_sampler(self, noise_scheduler: Any) -> SchedulerMixin:
        from diffusers.schedulers.scheduling_k_dpm_2_ancestral_discrete import KDPM2AncestralDiscreteScheduler

        return plain_sampler("dpm_2_a", KDPM2AncestralDiscreteScheduler, noise_scheduler)
