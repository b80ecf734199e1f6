"""One job a stage, and `run_all` for all of them: python -m jobs.VERB_NOUN --config FILE [section.key=value ...]"""
