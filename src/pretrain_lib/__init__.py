"""Pretrain language models inside the Hugging Face ecosystem.

The path of the data is the order of reading: text (`data.sources`), tokens (`data.prepare`),
shuffled and packed windows (`data.order`, `data.batches`), model and loss (`models`, `loss`), step
(`step`), checkpoint (`checkpoint`), and the loop that puts them together (`train`).
"""

from pretrain_lib.checkpoint import TrainingState as TrainingState
from pretrain_lib.checkpoint import find_newest as find_newest
from pretrain_lib.checkpoint import load_checkpoint as load_checkpoint
from pretrain_lib.checkpoint import save_checkpoint as save_checkpoint
from pretrain_lib.checkpoint import verify_checkpoint as verify_checkpoint
from pretrain_lib.command import run_recipe as run_recipe
from pretrain_lib.config import BatchConfig as BatchConfig
from pretrain_lib.config import DataConfig as DataConfig
from pretrain_lib.config import OptimizerConfig as OptimizerConfig
from pretrain_lib.config import Recipe as Recipe
from pretrain_lib.config import RunConfig as RunConfig
from pretrain_lib.config import SampleConfig as SampleConfig
from pretrain_lib.config import ScheduleConfig as ScheduleConfig
from pretrain_lib.corpus import open_corpus as open_corpus
from pretrain_lib.data.arrays import TokenArray as TokenArray
from pretrain_lib.data.arrays import open_split as open_split
from pretrain_lib.data.batches import PackedDataset as PackedDataset
from pretrain_lib.data.batches import iterate_steps as iterate_steps
from pretrain_lib.data.batches import rank_micro_batches as rank_micro_batches
from pretrain_lib.data.best_fit import BestFitPlan as BestFitPlan
from pretrain_lib.data.best_fit import open_plan as open_plan
from pretrain_lib.data.foreign import open_foreign as open_foreign
from pretrain_lib.data.job import Job as Job
from pretrain_lib.data.loaders import collate_for_transformers as collate_for_transformers
from pretrain_lib.data.order import WindowOrder as WindowOrder
from pretrain_lib.data.prepare import prepare as prepare
from pretrain_lib.data.shards import verify_folder as verify_folder
from pretrain_lib.data.sources import DatasetSource as DatasetSource
from pretrain_lib.data.spool import open_spool as open_spool
from pretrain_lib.data.streaming import StreamingDataset as StreamingDataset
from pretrain_lib.data.tokenizer import Tokenizer as Tokenizer
from pretrain_lib.data.tokenizer import load_tokenizer as load_tokenizer
from pretrain_lib.data.tokenizer import train_tokenizer as train_tokenizer
from pretrain_lib.engine import start_accelerator as start_accelerator
from pretrain_lib.evaluate.validation import validate as validate
from pretrain_lib.generate import generate as generate
from pretrain_lib.generate import sample_texts as sample_texts
from pretrain_lib.loss import IGNORED_TARGET as IGNORED_TARGET
from pretrain_lib.loss import linear_cross_entropy as linear_cross_entropy
from pretrain_lib.models.adapter import CausalLMAdapter as CausalLMAdapter
from pretrain_lib.models.gpt2 import GPT2 as GPT2
from pretrain_lib.models.gpt2 import GPT2Config as GPT2Config
from pretrain_lib.models.hf import check_parity as check_parity
from pretrain_lib.models.hf import load_pretrained as load_pretrained
from pretrain_lib.models.hf import save_pretrained as save_pretrained
from pretrain_lib.models.llama import Llama as Llama
from pretrain_lib.models.llama import LlamaConfig as LlamaConfig
from pretrain_lib.open_data import Corpus as Corpus
from pretrain_lib.optim import build_adamw as build_adamw
from pretrain_lib.optim import parameter_groups as parameter_groups
from pretrain_lib.schedule import BatchSizes as BatchSizes
from pretrain_lib.schedule import LearningRate as LearningRate
from pretrain_lib.step import StepResult as StepResult
from pretrain_lib.step import train_step as train_step
from pretrain_lib.train import train as train
