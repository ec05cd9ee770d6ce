"""How a teacher's logits come to the student's ranks.

frozen                       a teacher in the student's processes and layout
own_layout                   in the student's processes, in a layout of its own
own_ranks                    in processes of its own
learning                     a teacher that is trained together with its student
cached, read_ahead           a teacher whose logits are on disk, read while the student computes
logit_cache, manifest        the directory of that cache
samples, packing             a sample in it, and its compact form
cache_filling                how it is filled
open                         the teacher for given settings
several                      several teachers: who scores which sequence
placement                    which rank holds what, and what is sent
"""
