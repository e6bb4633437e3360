"""What the statistical tests may differ by: one comparison in two million exceeds its bound by chance.

The suite makes fewer than 200 such comparisons. So a correct program fails any of them with probability below 1e-4, as far
as the statistics follow t and chi-square: means of skewed weights and small counts do so roughly.
"""

from scipy import stats

FALSE_ALARM = 5e-7


def t_bound(n):
    """Of |mean - truth| in standard errors, both from n independent values (5.0 for large n)."""
    return stats.t.isf(FALSE_ALARM / 2, n - 1)


def errors_off(log_z, exact):
    """|mean Z-hat / Z - 1| in standard errors of the runs, from their log Z-hat [r] and log Z, without a floor."""
    ratios = (log_z - exact).exp()
    return abs(ratios.mean() - 1) / (ratios.std() / len(ratios) ** 0.5).clamp(min=1e-9)


def agree(counts, expected):
    """Whether counts may be draws with these expectations: chi-square over those above 5."""
    often = expected > 5
    square = ((counts - expected)[often] ** 2 / expected[often]).sum()
    return square < stats.chi2.isf(FALSE_ALARM, int(often.sum()))


MANY = t_bound(10**9)
