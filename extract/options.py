"""Command-line options that several commands share: which LLM, which texts, how it reads them."""

from typing import Annotated

import typer

GgufFile = Annotated[str | None, typer.Option(help="Name of the GGUF inside the folder or repository.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the hub repository.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that the model's repository ships.")
]
ComputeDtype = Annotated[
    str, typer.Option(help="Type the backbone runs in; auto: the checkpoint's own on cuda, float32 elsewhere.")
]
Device = Annotated[str, typer.Option(help="cuda, mps, cpu or auto.")]
BatchTokens = Annotated[
    int | None, typer.Option(help="Token slots of a forward pass; default 16384 on a GPU, 512 a thread on the CPU.")
]

Task = Annotated[str | None, typer.Option("--task", help="Preset: stsb, sick, wmt-en-zh, wmt-ru-en or wmt-si-en.")]
Hub = Annotated[str | None, typer.Option("--hub", help="Hub id of a data set, instead of --data.")]
HubConfig = Annotated[str | None, typer.Option(help="Configuration of that data set.")]
HubRevision = Annotated[str | None, typer.Option(help="Branch, tag or commit of its repository.")]
HubSplits = Annotated[str | None, typer.Option(metavar="SPLIT,...", help="Splits to take of it; default all.")]
Prompt = Annotated[str | None, typer.Option("--prompt", help='Template over column names: "{title}: {text}".')]
ChatTemplate = Annotated[
    bool, typer.Option("--chat-template", help="Put the prompt through the model's chat template.")
]
TargetColumn = Annotated[str | None, typer.Option(help="Column of the gold score.")]
IdColumn = Annotated[str | None, typer.Option(help="Column of the rows' ids.")]
LabelRange = Annotated[str | None, typer.Option(metavar="LOW,HIGH", help="Smallest and largest possible score.")]
MaxLength = Annotated[int | None, typer.Option(help="Longest row in tokens; default the backbone's context.")]
Truncate = Annotated[bool, typer.Option("--truncate", help="Cut longer rows at their end, the prompt's end included.")]

AsJson = Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")]
