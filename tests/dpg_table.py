"""A table as DPG-Bench has it, for its tests."""

import csv


def write_csv(path, questions):
    """A dpg_bench.csv of rows (item, id, dependency, tuple)."""
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        columns = "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple"
        out.writerow([*columns.split(","), "question_natural_language"])
        for item, number, dependency, form in questions:
            out.writerow([item, f"the {item},\nso to say", "", number, dependency, "", "", form, f"Is it {form}?"])
    return path
