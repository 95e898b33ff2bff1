"""Run the real img2dataset on a table, in several output formats: run_img2dataset.py TABLE FOLDER FORMAT…

Its processes are forked, not spawned: each would import it all again, which takes longer than what the tests have it do.
"""

import multiprocessing
import multiprocessing.context
import os
import sys

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # it would ask the web for a newer version

_get_context = multiprocessing.get_context
multiprocessing.context.SpawnProcess = multiprocessing.context.ForkProcess
multiprocessing.get_context = lambda method=None: _get_context("fork")

if __name__ == "__main__":
    import img2dataset

    table, folder, *formats = sys.argv[1:]
    for output_format in formats:
        img2dataset.download(
            url_list=table,
            input_format="parquet",
            url_col="URL",
            caption_col="TEXT",
            output_format=output_format,
            output_folder=f"{folder}/{output_format}",
            image_size=64,
            processes_count=1,
            thread_count=8,
            number_sample_per_shard=5,
            save_additional_columns=["similarity", "punsafe", "AESTHETIC_SCORE"],
            enable_wandb=False,
        )
