"""The instruction of each task of MTEB(eng, v2), and which side of the task carries it (docs/method.md §2).

The wording decides more than it seems to: an instruction that says "retrieve" and not "semantic" leaves the documents
bare (`gircse.lm.prompts.is_symmetric`), as in training. Retrieval and reranking say it, all others do not or say
"semantic".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from gircse.lm.prompts import is_symmetric

if TYPE_CHECKING:
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.types import PromptType

_SIMILAR = "Retrieve semantically similar text"
_EVIDENCE = "Given a claim, retrieve documents that support or refute the claim"
_DUPLICATE = "Given a question, retrieve questions from StackExchange that ask the same"

ENGLISH_V2: dict[str, str] = {
    # retrieval: queries carry the instruction, documents are bare
    "ArguAna": "Given a claim, retrieve documents that refute the claim",
    "CQADupstackGamingRetrieval": _DUPLICATE,
    "CQADupstackUnixRetrieval": _DUPLICATE,
    "ClimateFEVERHardNegatives": "Given a claim about the climate, retrieve documents that support or refute the claim",
    "FEVERHardNegatives": _EVIDENCE,
    "FiQA2018": "Given a financial question, retrieve user replies that best answer the question",
    "HotpotQAHardNegatives": "Given a multi-hop question, retrieve documents that help to answer the question",
    "SCIDOCS": "Given the title of a scientific paper, retrieve abstracts of papers that it cites",
    "TRECCOVID": "Given a query on COVID-19, retrieve documents that answer the query",
    "Touche2020Retrieval.v3": "Given a question, retrieve detailed and persuasive arguments that answer the question",
    # reranking: the same
    "AskUbuntuDupQuestions": "Given a question, retrieve duplicate questions from the AskUbuntu forum",
    "MindSmallReranking": "Given a news article that a user has read, retrieve articles that the user reads next",
    # pairs, similarity, summaries: both sides carry it
    "SprintDuplicateQuestions": "Retrieve semantically equivalent questions from the Sprint forum",
    "TwitterSemEval2015": "Retrieve tweets that are semantically similar to the given tweet",
    "TwitterURLCorpus": "Retrieve tweets that are semantically similar to the given tweet",
    "BIOSSES": _SIMILAR,
    "SICK-R": _SIMILAR,
    "STS12": _SIMILAR,
    "STS13": _SIMILAR,
    "STS14": _SIMILAR,
    "STS15": _SIMILAR,
    "STS17": _SIMILAR,
    "STS22.v2": _SIMILAR,
    "STSBenchmark": _SIMILAR,
    "SummEvalSummarization.v2": "Given a news summary, retrieve other semantically similar summaries",
    # classification
    "AmazonCounterfactualClassification": "Classify an Amazon customer review as counterfactual or not counterfactual",
    "Banking77Classification": "Given an online banking query, find the intent of the customer",
    "ImdbClassification": "Classify the sentiment of a movie review from IMDB",
    "MTOPDomainClassification": "Classify the domain of an utterance in a task-oriented conversation",
    "MassiveIntentClassification": "Given an utterance to a voice assistant, find the intent of the user",
    "MassiveScenarioClassification": "Given an utterance to a voice assistant, find the scenario it belongs to",
    "ToxicConversationsClassification": "Classify a comment as toxic or not toxic",
    "TweetSentimentExtractionClassification": "Classify the sentiment of a tweet as positive, negative or neutral",
    # clustering
    "ArXivHierarchicalClusteringP2P": "Tell the category and subcategory of an arXiv paper by its title and abstract",
    "ArXivHierarchicalClusteringS2S": "Tell the category and subcategory of an arXiv paper by its title",
    "BiorxivClusteringP2P.v2": "Identify the main category of a Biorxiv paper by its title and abstract",
    "MedrxivClusteringP2P.v2": "Identify the main category of a Medrxiv paper by its title and abstract",
    "MedrxivClusteringS2S.v2": "Identify the main category of a Medrxiv paper by its title",
    "StackExchangeClustering.v2": "Identify the topic of a StackExchange post by its title",
    "StackExchangeClusteringP2P.v2": "Identify the topic of a StackExchange post by its paragraphs",
    "TwentyNewsgroupsClustering.v2": "Identify the topic of a newsgroup post",
}


def task_instruction(metadata: TaskMetadata, instructions: Mapping[str, str] = ENGLISH_V2) -> str:
    """The instruction of a task: from `instructions` by its name, else mteb's own for the task, else for its type."""
    if metadata.name in instructions:
        return instructions[metadata.name]
    prompt = metadata.prompt
    if isinstance(prompt, dict):
        prompt = prompt.get("query")
    if prompt:
        return prompt
    from mteb.abstasks.abstask import get_abstask_prompt

    return get_abstask_prompt(metadata.name)


def text_instruction(
    metadata: TaskMetadata, prompt_type: PromptType | None, instructions: Mapping[str, str] = ENGLISH_V2
) -> str | None:
    """The instruction that the texts of one side carry; None: they are embedded bare.

    prompt_type: mteb's "query" or "document"; None in tasks whose texts are all of one kind. Documents are bare unless
    the task is symmetric, or mteb's metadata has an instruction for documents and `instructions` has none.
    """
    instruction = task_instruction(metadata, instructions)
    if prompt_type is None or prompt_type.value != "document":
        return instruction
    if metadata.name not in instructions and isinstance(metadata.prompt, dict) and metadata.prompt.get("document"):
        return metadata.prompt["document"]
    return instruction if is_symmetric(instruction) else None
