{{/* The migrations' Job. Knows when it runs and under which name; what it does is the image's matter. */}}

{{/*
"true" where the Job is a hook before the release's own objects. With the bundled database it is one of them: before them there
is no database, and a hook after them would never come under `helm install --wait`, as the API is ready only after it.
*/}}
{{- define "merger.migrations.hook" -}}
{{- if and .Values.migrations.useHelmHooks (not .Values.postgresql.enabled) }}true{{ end -}}
{{- end -}}

{{/* Annotations of an object that the hook needs: (dict "root" $ "weight" "-10"). */}}
{{- define "merger.migrations.annotations" -}}
{{- if include "merger.migrations.hook" .root -}}
helm.sh/hook: pre-install,pre-upgrade
helm.sh/hook-weight: {{ .weight | quote }}
helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
{{- end -}}
{{- end -}}

{{- define "merger.migrations.spec" -}}
{{- $migrations := dict "root" . "component" "migrations" "values" .Values.migrations -}}
backoffLimit: {{ .Values.migrations.backoffLimit }}
activeDeadlineSeconds: {{ .Values.migrations.activeDeadlineSeconds }}
{{- if not (include "merger.migrations.hook" .) }}
ttlSecondsAfterFinished: {{ .Values.migrations.ttlSecondsAfterFinished }}
{{- end }}
template:
  metadata:
    {{- include "merger.podMetadata" $migrations | nindent 4 }}
  spec:
    restartPolicy: Never
    {{- include "merger.podSettings" $migrations | nindent 4 }}
    containers:
      - name: migrations
        {{- include "merger.container" $migrations | nindent 8 }}
        command: [python, -m, api.store.migrate]
        {{- with .Values.migrations.extraEnvFrom }}
        envFrom:
          {{- tpl (toYaml .) $ | nindent 10 }}
        {{- end }}
        env:
          {{- include "merger.databaseEnv" . | nindent 10 }}
          {{- include "merger.extraEnv" $migrations | nindent 10 }}
        volumeMounts:
          {{- include "merger.mounts" $migrations | nindent 10 }}
    volumes:
      {{- include "merger.volumes" $migrations | nindent 6 }}
{{- end -}}
