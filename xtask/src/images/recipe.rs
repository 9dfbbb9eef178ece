//! What the test images consist of: data only. Knows neither buildah nor a registry.

/// One layer on top of the base.
pub(crate) enum Step {
    /// A shell script run inside the image, as root.
    Inside(&'static str),
    /// Debian packages installed inside the image.
    Packages(&'static str),
    /// A shell script run on the host with the image's root in `$ROOT`.
    Outside(&'static str),
}

/// An image: the common Debian base, then one layer per step.
pub(crate) struct Recipe {
    pub(crate) name: &'static str,
    pub(crate) about: &'static str,
    pub(crate) steps: &'static [Step],
    /// Arguments of `buildah config` for the last layer.
    pub(crate) config: &'static [&'static str],
}

/// The packages of the base layer beside Debian's `minbase`.
pub(crate) const BASE_PACKAGES: &str = "ca-certificates,perl,locales,procps,less,xz-utils,bzip2";

/// Text that a lower layer holds and an upper layer deletes; no image may contain it.
pub(crate) const CANARY: &str = "canary-7f1c0a52-deleted-by-an-upper-layer";

pub(crate) const RECIPES: &[Recipe] = &[
    Recipe {
        name: "small",
        about: "nginx and python3: capabilities, hard links, whiteouts, an escaping symlink",
        steps: SMALL,
        config: &[
            "--entrypoint=[\"/usr/sbin/nginx\"]",
            "--cmd=-g 'daemon off;'",
            "--env=LANG=C.UTF-8",
            "--env=APP_HOME=/srv/app",
            "--port=80",
            "--workingdir=/srv/app",
            "--user=www-data",
            "--volume=/srv/data",
            "--label=org.opencontainers.image.title=small",
        ],
    },
    Recipe {
        name: "node",
        about: "Node.js with a large node_modules: 100k small files, 43k of them in one directory",
        steps: NODE,
        config: &["--cmd=node /app/server.js", "--port=3000", "--workingdir=/app"],
    },
    Recipe {
        name: "node-reduced",
        about: "the node image with a tenth of the files",
        steps: NODE_REDUCED,
        config: &["--cmd=node /app/server.js", "--port=3000", "--workingdir=/app"],
    },
    Recipe {
        name: "large",
        about: "compilers, Python, Boost, docs: overwrites, whiteouts, an opaque directory, zeros",
        steps: LARGE,
        config: &["--cmd=/bin/bash", "--workingdir=/home/builder", "--user=1001:1001"],
    },
];

const SMALL: &[Step] = &[
    Step::Packages(
        "nginx-light python3 python3-requests python3-jinja2 iputils-ping libcap2-bin curl git",
    ),
    Step::Inside(
        "mkdir -p /srv/app /srv/data
         printf 'print(1)\\n' > /srv/app/app.py
         ln /srv/app/app.py /srv/app/hard.py
         ln -s ../../../../../../tmp/escape /srv/app/escape
         printf '%s' 'canary-7f1c0a52-deleted-by-an-upper-layer' > /srv/app/canary.txt
         head -c 300000 /dev/urandom > /srv/app/canary.bin
         cat /srv/app/canary.txt >> /srv/app/canary.bin
         setcap cap_net_raw+ep /usr/bin/ping
         chown -R www-data:www-data /srv/data",
    ),
    Step::Inside(
        "rm -rf /usr/share/doc/nginx* /usr/share/doc/git /srv/app/canary.txt /srv/app/canary.bin
         rm -f /usr/share/man/man1/git-a*
         find /usr/share/locale -mindepth 1 -maxdepth 1 -name 'z*' -exec rm -rf {} +",
    ),
    Step::Inside(
        "printf 'server { listen 80; root /srv/app; }\\n' > /etc/nginx/sites-available/default
         chmod 4755 /usr/bin/env; mkfifo /srv/app/pipe; chmod 1777 /srv/data
         touch -d '2001-02-03 04:05:06.789012345' /srv/app/app.py",
    ),
];

/// Versions are named so that two machines get the same files.
const NODE: &[Step] = &[
    Step::Packages("nodejs"),
    Step::Outside(
        "mkdir -p \"$ROOT/app\"; cd \"$ROOT/app\"
         npm install --ignore-scripts --no-audit --no-fund --loglevel=error \
           @mui/icons-material@9.5.0 @mui/material@9.5.0 react@19.3.1 react-dom@19.3.1 \
           date-fns@4.4.0 typescript@7.0.2 lodash@4.18.1 rxjs@7.8.2 core-js@3.51.0",
    ),
    Step::Outside(
        "cd \"$ROOT/app\"
         npm install --ignore-scripts --no-audit --no-fund --loglevel=error \
           next@16.4.6 webpack@5.112.2 googleapis@178.0.0 jest@30.5.2 eslint@10.15.0 \
           three@0.187.0 @tabler/icons-react@3.51.0 lodash-es@4.18.1",
    ),
    Step::Inside(
        "printf 'require(\"http\").createServer((q, r) => r.end(\"ok\")).listen(3000)\\n' \
           > /app/server.js
         chown -R nobody:nogroup /app/server.js /app/package.json",
    ),
    Step::Inside("find /app/node_modules -name '*.md' -delete; rm -rf /app/node_modules/lodash/fp"),
];

const NODE_REDUCED: &[Step] = &[
    Step::Packages("nodejs"),
    Step::Outside(
        "mkdir -p \"$ROOT/app\"; cd \"$ROOT/app\"
         npm install --ignore-scripts --no-audit --no-fund --loglevel=error \
           date-fns@4.4.0 core-js@3.51.0 react@19.3.1",
    ),
    Step::Outside(
        "cd \"$ROOT/app\"
         npm install --ignore-scripts --no-audit --no-fund --loglevel=error \
           lodash@4.18.1 rxjs@7.8.2",
    ),
    Step::Inside(
        "printf 'require(\"http\").createServer((q, r) => r.end(\"ok\")).listen(3000)\\n' \
           > /app/server.js
         chown -R nobody:nogroup /app/server.js /app/package.json",
    ),
    Step::Inside("find /app/node_modules -name '*.md' -delete; rm -rf /app/node_modules/lodash/fp"),
];

const LARGE: &[Step] = &[
    Step::Packages("build-essential git cmake gdb strace"),
    Step::Packages("python3-full python3-dev python3-pip python3-numpy python3-scipy"),
    Step::Packages("libboost-all-dev libboost-doc"),
    Step::Packages("golang-1.19-go"),
    Step::Packages("nodejs python3-doc manpages-dev libicu-dev"),
    Step::Inside(
        "useradd -m -u 1001 builder
         cp -a /usr/include /home/builder/include; chown -R 1001:1001 /home/builder
         head -c 67108864 /dev/zero > /home/builder/zeros
         truncate -s 64M /home/builder/sparse; printf tail >> /home/builder/sparse",
    ),
    Step::Inside(
        "rm -rf /usr/share/doc/libboost1.74-doc/examples
         rm -rf /usr/share/gdb && mkdir -p /usr/share/gdb/auto-load
         printf 'fresh\\n' > /usr/share/gdb/auto-load/only-this
         rm -rf /usr/share/locale/* /home/builder/include/boost/phoenix",
    ),
    Step::Inside(
        "find /usr/include/boost -name '*.hpp' -exec sh -c \
           'for f; do printf \"// touched\\n\" >> \"$f\"; done' _ {} +
         chmod -R g+w /usr/lib/go-1.19/src",
    ),
    Step::Inside(
        "rm -rf /usr/lib/go-1.19/pkg/tool; ln -sfn /usr/bin/gcc /usr/local/bin/cc
         printf 'export PATH\\n' > /etc/profile.d/builder.sh",
    ),
];
