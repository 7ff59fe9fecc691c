"""What a run tells its user: console, MindFormers' log line, metrics and their plot, environment, `doctor`.

A leaf: any module may import it, and it imports neither mindspore nor any other part of llm_core but errors.
"""
