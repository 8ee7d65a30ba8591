"""Turn the runs of one recipe family into `report.json`, pictures and one self-contained `report.html`.

reading   what is on disk: `Phase`, `Family`, `read_family`
measures  numbers derived from the metrics: Wilson intervals, compute curves, goals, surgery rows
style     one matplotlib style, light and dark, colour-blind safe
pictures, agent_pictures
          one function a picture; a picture whose numbers are missing is reported as missing
page      report.json, report.html, the PNGs
terminal  the compact table
"""

from .page import write_report
from .reading import Family, Phase, read_family
from .terminal import print_report

__all__ = ["Family", "Phase", "print_report", "read_family", "write_report"]
