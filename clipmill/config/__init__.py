"""The one configuration of a run: sections, defaults, units, and which keys identify data on disk.

``clipmill STAGE --config run.yaml [section.key=value ...]``: YAML files merge left to right, then the
assignments, then pydantic checks the result (an unknown key is an error). docs/configuration.md lists every key.

Every key is *identity* unless it is marked ``FREE``. Identity keys enter the fingerprint of what a stage
writes: running the stage again over its own output with another value is refused, naming the keys.
Free keys (batch size of a fan-out stage, logging, number of steps, learning rate) may change at any time.
"""

from __future__ import annotations

from clipmill.config.data import ClipConfig, DataConfig, MixPart, frame_size
from clipmill.config.load import load_config, shipped_configs
from clipmill.config.place import StoragePlace
from clipmill.config.prior import PRESETS, PriorModelConfig
from clipmill.config.recorded import with_recorded_clips
from clipmill.config.reference import Key, SectionReference, all_sections, json_schema, markdown, schema_keys
from clipmill.config.run import ClusterConfig, EvaluateConfig, RunConfig, SampleConfig, TokenizeConfig
from clipmill.config.section import FREE, Section, changed_keys, fingerprint, identity, with_places
from clipmill.config.sharpness import SharpnessConfig
from clipmill.config.source import SourceConfig, TableColumns
from clipmill.config.training import (
    PriorConfig,
    TrainingConfig,
    VQVAEConfig,
    VQVAETrainingConfig,
    refused_changes,
)
from clipmill.config.vqvae import VQVAEModelConfig

__all__ = [
    "FREE",
    "PRESETS",
    "ClipConfig",
    "ClusterConfig",
    "DataConfig",
    "EvaluateConfig",
    "Key",
    "MixPart",
    "PriorConfig",
    "PriorModelConfig",
    "RunConfig",
    "SampleConfig",
    "Section",
    "SectionReference",
    "SharpnessConfig",
    "SourceConfig",
    "StoragePlace",
    "TableColumns",
    "TokenizeConfig",
    "TrainingConfig",
    "VQVAEConfig",
    "VQVAEModelConfig",
    "VQVAETrainingConfig",
    "all_sections",
    "changed_keys",
    "fingerprint",
    "frame_size",
    "identity",
    "json_schema",
    "load_config",
    "markdown",
    "refused_changes",
    "schema_keys",
    "shipped_configs",
    "with_places",
    "with_recorded_clips",
]
