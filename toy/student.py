"""The student that comes along, toy/student: stage 1 with the default settings, then stage 2, by train.py itself."""

import json
import subprocess
import sys
import time

from engine.models import load_denoiser
from engine.run_folder import newest, saved_settings
from toy.fit import HERE, forget_path, report

STAGE_2 = ("--rl-ratio", "2", "--iterations", "240")
OF_THE_RUN = "preset out init resume overwrite workers keep".split()  # settings that say nothing of a student


def build_student():
    one, two, measured = (HERE / ".build" / name for name in ("student-1", "student-2", "student.json"))
    began = time.time()
    for flags in (("--stage", "1", "--out", one), ("--stage", "2", "--init", one, "--out", two, *STAGE_2)):
        command("train.py", *flags, "--resume", "--preview-every", "0")
    command("evaluate.py", "--run", two, "--json", measured)
    folder = HERE / "student"
    settings = {k: v for k, v in saved_settings(two).items() if k not in OF_THE_RUN}
    load_denoiser("toy/sdxl", student=newest(two)).net.half().save_pretrained(folder / "unet")
    forget_path(folder)
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    scores = json.loads(measured.read_text())
    reached = {k: scores[k] for k in ("prompt_accuracy", "frechet", "reward")}
    report("student", time.time() - began, {"prompt_accuracy": 0.9}, **reached)


def command(script, *flags):
    """Run a script of the project with these flags; it must end well."""
    subprocess.run([sys.executable, script, *map(str, flags)], cwd=HERE.parent, check=True)
