"""`check_rule` holds a rule, ours or one from outside, to what training relies on.

from ds_gradmix.testing import check_rule

def test_my_rule():
    check_rule(MyRule(threshold=0.5))
"""

from ds_gradmix.testing.checks import check_rule as check_rule
