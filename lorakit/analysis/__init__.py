"""Reading records: tidy frames, statistics, tables, reports. Nothing here needs torch, or how a run is made.

Names are imported from their modules, on first use: `import lorakit` loads neither pandas nor scipy.
"""
