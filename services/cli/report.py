"""stub"""

from pathlib import Path

from services.cli.run_folder import RunFolder


def make_report(folder: RunFolder) -> Path:
    return folder.report
